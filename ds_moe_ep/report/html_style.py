"""The page's style: one column, quiet tables, pictures on white also in the dark, and fit for paper."""

STYLE = """
:root { --ground: #fff; --ink: #1d2126; --faint: #5c6670; --line: #dfe3e7; --shade: #f4f6f8; --mark: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --ink: #e4e7ea; --faint: #9aa4ae; --line: #343a41; --shade: #1e2329; --mark: #56b4e9 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.75rem 0 .4rem }
p, ul, pre { margin: .75rem 0 }
ul { padding-left: 1.25rem }
a { color: var(--mark) }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; padding: 0; font-size: .92rem }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
pre { background: var(--shade); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--faint); font-weight: 600; border-bottom-color: var(--faint) }
th.number, td.number { text-align: right; white-space: nowrap }
tr.strong td { font-weight: 650; background: var(--shade) }
.basis { color: var(--faint); font-size: .84rem; margin: .4rem 0 0 }
figure { margin: 1.5rem 0 }
figure img { display: block; width: 100%; padding: .6rem;
  background: #fff; border: 1px solid var(--line); border-radius: 6px }
@media (max-width: 40rem) { figure img { min-width: 40rem } }
figcaption { font-size: .92rem; margin-top: .5rem }
@media print {
  :root { --ground: #fff; --ink: #000; --faint: #444; --line: #ccc; --shade: #f4f4f4; --mark: #000 }
  main { max-width: none; padding: 0 }
  nav { display: none }
  figure, tr, .table { break-inside: avoid }
  h2, h3 { break-after: avoid }
  table { font-size: 8pt }
}
"""
