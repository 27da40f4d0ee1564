"""Records in, paper out: one page in HTML and Markdown, with its figures. No number that is not in a Record.

findings.py   reads Records and spans, and answers by the parts of a name (records/names.py)
page.py       parts of a page: a headline, sections of prose, tables and pictures, notes that each stand there once
sections/     the headline and the sections, each from the findings alone; a section without Records is absent
plots/        the pictures, for pages in the light and in the dark; the only files that know matplotlib
html.py, markdown.py   the page in two writings, its tables by records/render.py
write.py      page -> report.html, report.md, figures/
"""
