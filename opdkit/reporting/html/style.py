"""The style sheet of the pages and of their figures, light or dark as the reader's system is; light on paper.

A colour has one meaning on all pages, and a shape, a dash or a sign says the same again:

    blue     the student, and on a page of several runs the first of them; purple, teal, olive, grey, black: the others
    orange   the teacher
    green, magenta   tokens that the teacher found likelier than the student did, or less likely; violet: not known
    amber    what a reader must know before believing the numbers
"""

from __future__ import annotations

COLOURS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1e23;--quiet:#5f6772;--line:#e4e7eb;--wash:#f6f7f9;
--student:#0072b2;--teacher:#c25200;--arm:#7a828d}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e4e6ea;--quiet:#9aa2ad;--line:#2c3036;
--wash:#1d2024;--student:#56b4e9;--teacher:#e69f00;--arm:#8d95a0}}
"""

FIGURE = """
svg{display:block;overflow:visible}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:12px;
fill:var(--quiet);font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}
.whisker{stroke-width:1.5}
.dot{stroke-width:1.75}
.before .whisker,.before .dot{stroke:var(--student)}.before .dot{fill:var(--paper)}
.after .whisker,.after .dot{stroke:var(--c,var(--student))}.after .dot{fill:var(--c,var(--student))}
.best .whisker,.best .dot{stroke:var(--student)}.best .dot{fill:var(--paper)}
.arm .whisker,.arm .dot{stroke:var(--arm)}.arm .dot{fill:var(--paper)}
.teacher .whisker,.teacher .dot{stroke:var(--teacher)}.teacher .dot{fill:var(--teacher)}
"""

STANDALONE = """
svg .title{font-size:16px;font-weight:600;fill:var(--ink)}
svg .label{font-size:14px;fill:var(--ink)}
svg .value{font-size:14px;fill:var(--ink)}
svg .strong{font-weight:600}
.paper{fill:var(--paper)}
"""

_SHELL = """
:root{--more:#00795a;--less:#b0367f;--either:#6d5f8a;--warn:#8a5a00;--warnwash:#fdf6e3;--s1:#7a4fa3;--s2:#0c8487;
--s3:#6b7300}
@media screen and (prefers-color-scheme:dark){:root{--more:#3cc79d;--less:#e889bd;--either:#a99fc4;--warn:#e3b655;
--warnwash:#26221a;--s1:#b794e6;--s2:#4fc3c6;--s3:#c3c94e}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:3.5rem 1.5rem 5rem}
h1{font-size:1.75rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;font-weight:650;margin:4rem 0 1rem;letter-spacing:-.005em}
h3{font-size:1rem;font-weight:600;margin:2.5rem 0 .25rem;overflow-wrap:anywhere}
h2+h3{margin-top:0}
p{margin:.4rem 0;max-width:44rem}
header p{max-width:none}
a{color:inherit;text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--ink);outline-offset:2px}
.quiet{color:var(--quiet)}
.small{font-size:.875rem;max-width:none}
.facts{display:grid;grid-template-columns:auto minmax(0,1fr);gap:.1rem 1.25rem;margin:1.1rem 0 0;font-size:.875rem}
.facts dt{color:var(--quiet)}
.facts dd{margin:0;overflow-wrap:anywhere}
.lead{max-width:44rem;font-size:1.0625rem;margin:1.1rem 0 0}
nav{font-size:.875rem;margin:1.75rem 0 0}
nav ol{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;margin:0;padding:.6rem 0;
border-block:1px solid var(--line)}
nav a{color:var(--quiet);text-decoration:none;display:inline-block;padding:.15rem 0}
nav a:hover{color:var(--ink);text-decoration:underline}
@media (min-width:86rem){nav{position:fixed;top:3.5rem;width:9.5rem;left:calc(50% - 42rem);margin:0}
nav ol{display:block;border:0;padding:0}nav li{margin:.3rem 0}}
.notes{background:var(--warnwash);border-left:3px solid var(--warn);padding:.7rem 1rem;margin:1rem 0 0;list-style:none}
.notes li{margin:.3rem 0;overflow-wrap:anywhere}
details{border-top:1px solid var(--line);padding:.7rem 0}
details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;font-weight:550}
details pre{max-height:none;margin-top:.8rem}
pre{font:.8125rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:0;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;max-height:20rem;overflow:auto}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 3rem}
footer{margin-top:4rem;font-size:.8125rem;color:var(--quiet)}
.ended{position:fixed;left:0;right:0;bottom:0;z-index:8;margin:0;padding:.6rem 1.1rem;max-width:none;font-size:.875rem;
background:var(--warnwash);border-top:1px solid var(--warn)}
button{font:inherit;font-size:.875rem;color:inherit;background:var(--wash);border:1px solid var(--quiet);
border-radius:4px;padding:.3rem .8rem;cursor:pointer}
[hidden]{display:none!important}
"""

# The shadows at the edges lie behind the table and are covered by the paper's colour where it ends: they are seen only
# while there is more to scroll to. The first column stays.
_TABLES = """
.scroll{overflow-x:auto;margin:1.25rem 0 0;scrollbar-width:thin;padding-bottom:.25rem;
background:linear-gradient(90deg,var(--paper) 40%,transparent) 0 0/3rem 100% no-repeat local,
linear-gradient(270deg,var(--paper) 40%,transparent) 100% 0/3rem 100% no-repeat local,
linear-gradient(90deg,color-mix(in srgb,var(--ink) 30%,transparent),transparent) 0 0/.9rem 100% no-repeat scroll,
linear-gradient(270deg,color-mix(in srgb,var(--ink) 30%,transparent),transparent) 100% 0/.9rem 100% no-repeat scroll}
.scroll::-webkit-scrollbar{height:.5rem}
.scroll::-webkit-scrollbar-thumb{background:var(--arm);border-radius:.25rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem 1.25rem .35rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th{font-weight:500;color:var(--quiet)}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem;overflow-wrap:anywhere}
.runs th,.runs td{text-align:left}
.runs td:nth-child(2){white-space:normal;overflow-wrap:anywhere;min-width:8rem}
.runs th:first-child,.runs td:first-child{min-width:0}
@media (max-width:48rem){th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);z-index:1;
min-width:6.5rem;max-width:45vw;padding-right:.8rem}th,td{padding-right:.9rem}}
"""

_FIGURES = """
.bars{margin:1.25rem 0 0}
.bar{display:grid;grid-template-columns:minmax(0,1fr) auto;column-gap:1.5rem;align-items:baseline}
.bar .label{overflow-wrap:anywhere;padding:.45rem 0 .1rem}
.bar .value{font-variant-numeric:tabular-nums;white-space:nowrap}
.bar .value .quiet{font-size:.8125rem;margin-left:.5rem}
.bar .track{grid-column:1/-1;position:relative;height:1.4rem}
.bar .track>svg{position:absolute;inset:0}
.bar b{font-weight:500}
.bar.after .label,.bar.after b{font-weight:650}
@media (min-width:48rem){
.bar{grid-template-columns:minmax(0,17rem) minmax(0,1fr) 11.5rem;align-items:center}
.bar .label{padding:.35rem 0}
.bar .track{grid-column:2;grid-row:1;align-self:stretch;height:auto;min-height:1.4rem}
.bar .value{grid-column:3;text-align:right}}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17.5rem),1fr));gap:2.25rem 2.5rem;
margin-top:1.25rem}
section>.panels+details{margin-top:2.5rem}
details .panels{margin:1.5rem 0 1rem}
figure{margin:0;min-width:0}
figcaption{display:flex;justify-content:space-between;gap:1rem;font-size:.875rem;font-weight:550;margin-bottom:.5rem;
overflow-wrap:anywhere}
figcaption span{font-weight:400;color:var(--quiet);font-variant-numeric:tabular-nums;white-space:nowrap}
.curve{display:flex;position:relative;touch-action:pan-y}
.curve>svg:first-child{flex:none}
.curve>svg:nth-child(2){flex:1;min-width:0}
.s0{--c:var(--student)}.s1{--c:var(--s1);--d:7 3}.s2{--c:var(--s2);--d:2 2}.s3{--c:var(--s3);--d:9 3 2 3}
.s4{--c:var(--arm);--d:5 5}.s5{--c:var(--ink);--d:1 3}
.curve .raw,.curve .mean{fill:none;vector-effect:non-scaling-stroke;stroke:var(--c);stroke-linejoin:round;
stroke-linecap:round}
.curve .raw{stroke-width:1;opacity:.38}
.curve .mean{stroke-width:1.75;stroke-dasharray:var(--d)}
.curve .band{fill:var(--c);opacity:.16;stroke:none}
.curve .point{fill:var(--c)}
.curve .whisker{stroke:var(--c);opacity:.5}
.at{position:absolute;top:0;bottom:20px;width:0;border-left:1px solid var(--ink);pointer-events:none}
.said{position:absolute;bottom:100%;z-index:3;margin:0 0 .2rem;max-width:100%;padding:.2rem .5rem;font-size:.8125rem;
line-height:1.4;background:var(--paper);border:1px solid var(--quiet);border-radius:3px;white-space:pre-line;
overflow-wrap:anywhere;font-variant-numeric:tabular-nums;pointer-events:none}
.legend{line-height:1.9}
.legend span{display:inline-block;margin-right:1rem}
.legend svg{display:inline-block;vertical-align:.2em;margin-right:.3rem}
.legend line{stroke:var(--c);stroke-width:2;stroke-dasharray:var(--d)}
@media (max-width:30rem){main{padding:2rem 1.1rem 4rem}h2{margin-top:3rem}}
"""

_PRINT = """
@media print{
@page{margin:14mm}
body{font-size:10.5pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}
nav,.controls,.minimap,.at,.said{display:none!important}
h2,h3,summary,figcaption{break-after:avoid}
figure,tr,.bars,.chips{break-inside:avoid}
pre{max-height:none!important;overflow:visible!important}
.scroll{overflow:visible;background:none}
table{font-size:8.5pt}
.panels{grid-template-columns:repeat(3,1fr)}
a{text-decoration:none}
}
"""

PAGE = _SHELL + _TABLES + _FIGURES
PAPER = _PRINT  # last, so that it has the last word
