"""Records in, paper out: one page in HTML and Markdown, with its figures. No number that is not in a Record.

findings.py     reads Records and spans, and answers by the parts of a name (names.py)
quantities.py   a Record in the unit that a page wants, and how a number is written
page.py         what a page is made of: sections of prose, tables and pictures
sections_*.py   the sections, each from the findings alone; a section without Records is absent
plots_*.py      the pictures; the only files that know matplotlib
write.py        page -> report.html, report.md, figures/
"""
