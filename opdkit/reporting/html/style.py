"""The one style sheet of the report and of its figures, light or dark as the reader's system is.

Colours are those of Okabe and Ito, which colour-blind eyes tell apart; in the figures a shape says the same again.
"""

from __future__ import annotations

COLOURS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1e23;--quiet:#656d78;--line:#e4e7eb;--wash:#f6f7f9;
--student:#0072b2;--teacher:#c25200;--arm:#7a828d;--good:#00795a;--bad:#c25200;--warn:#8a5a00;--warnwash:#fdf6e3}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e4e6ea;--quiet:#9aa2ad;--line:#2c3036;--wash:#1d2024;
--student:#56b4e9;--teacher:#e69f00;--arm:#8d95a0;--good:#3cc79d;--bad:#f0934e;--warn:#e3b655;--warnwash:#26221a}}
"""

FIGURE = """
svg{display:block;overflow:visible}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:12px;
fill:var(--quiet);font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}
.whisker{stroke-width:1.5}
.dot{stroke-width:1.75}
.before .whisker,.before .dot{stroke:var(--student)}.before .dot{fill:var(--paper)}
.after .whisker,.after .dot{stroke:var(--student)}.after .dot{fill:var(--student)}
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


def _depths() -> str:
    """The colours of a token's part in the loss: u (the teacher likes it more), d (less), n (unknown), 1 to LEVELS."""
    colours = {"u": "--student", "d": "--teacher", "n": "--s3"}
    return "".join(
        f".{name}{level}{{background:color-mix(in srgb,var({colour}) {round(60 * level / LEVELS)}%,transparent)}}\n"
        for name, colour in colours.items()
        for level in range(1, LEVELS + 1)
    )


LEVELS = 6  # depths of colour of a token
PAGE = """
:root{--s3:#a0467d;--s4:#8a6d00}
@media (prefers-color-scheme:dark){:root{--s3:#d98cbb;--s4:#e6d25a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:3.5rem 1.5rem 5rem}
h1{font-size:1.75rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;font-weight:650;margin:4rem 0 1rem;letter-spacing:-.005em}
h3{font-size:1rem;font-weight:600;margin:2.5rem 0 .25rem;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:44rem}
header p{max-width:none}
.quiet{color:var(--quiet)}
.small{font-size:.875rem;max-width:none}
.facts{display:grid;grid-template-columns:auto minmax(0,1fr);gap:.1rem 1.25rem;margin:1.1rem 0 0;font-size:.875rem}
.facts dt{color:var(--quiet)}
.facts dd{margin:0;overflow-wrap:anywhere}
.lead{max-width:44rem;font-size:1.0625rem;margin:1.1rem 0 0}
.notes{background:var(--warnwash);border-left:3px solid var(--warn);padding:.7rem 1rem;margin:1.5rem 0 0;
list-style:none}
.notes li{margin:.3rem 0;overflow-wrap:anywhere}
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
.scroll{overflow-x:auto;margin:1.25rem 0 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem 1.25rem .35rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th{font-weight:500;color:var(--quiet)}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem;overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17.5rem),1fr));gap:2.25rem 2.5rem;
margin-top:1.25rem}
figure{margin:0;min-width:0}
figcaption{display:flex;justify-content:space-between;gap:1rem;font-size:.875rem;font-weight:550;margin-bottom:.5rem;
overflow-wrap:anywhere}
figcaption span{font-weight:400;color:var(--quiet);font-variant-numeric:tabular-nums;white-space:nowrap}
.curve{display:flex}
.curve>svg:first-child{flex:none}
.curve>svg:last-child{flex:1;min-width:0}
.s0{--c:var(--student)}.s1{--c:var(--teacher)}.s2{--c:var(--good)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}
.s5{--c:var(--arm)}
.curve .raw,.curve .mean{fill:none;vector-effect:non-scaling-stroke;stroke:var(--c);stroke-linejoin:round;
stroke-linecap:round}
.curve .raw{stroke-width:1;opacity:.38}
.curve .mean{stroke-width:1.75}
.curve .point{fill:var(--c)}
.curve .whisker{stroke:var(--c);opacity:.5}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 3rem}
article{border-top:1px solid var(--line);padding:.9rem 0 1rem;min-width:0}
.chips{display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:.8125rem;color:var(--quiet);
font-variant-numeric:tabular-nums}
.chips bdi{color:var(--ink);overflow-wrap:anywhere}
.chips .good,.chips .good bdi{color:var(--good);font-weight:600}
.chips .bad,.chips .bad bdi{color:var(--bad);font-weight:600}
.role{font-size:.75rem;color:var(--quiet);margin:.6rem 0 .1rem}
pre{font:.8125rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:0;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;max-height:20rem;overflow:auto}
pre.answer{background:var(--wash);padding:.5rem .7rem;border-radius:4px}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 2rem}
pre.peer{border-left:3px solid var(--line);padding:.2rem 0 .2rem .7rem}
.heat i{font-style:normal;border-radius:2px;cursor:default;outline:none}
.legend i{font:.8125rem ui-monospace,monospace;border-radius:2px;padding:0 .15rem}
.legend i{color:var(--ink)}
.legend b{color:var(--c);font-weight:800}
.legend span{display:inline-block;margin-right:.9rem}
.o{color:color-mix(in srgb,var(--ink) 42%,transparent)}
.m{color:var(--quiet);border-bottom:1px dotted var(--quiet)}
.x{box-shadow:inset 0 -2px var(--ink)}
.heat i:hover,.heat i:focus{box-shadow:0 0 0 1.5px var(--ink);position:relative;z-index:1}
.heat i:hover::after,.heat i:focus::after{content:attr(data-t);position:fixed;z-index:9;left:0;right:0;bottom:0;
padding:.7rem 1.1rem calc(.8rem + env(safe-area-inset-bottom));background:var(--wash);color:var(--ink);
border-top:1px solid var(--quiet);font:.8125rem/1.5 system-ui,sans-serif;white-space:pre-wrap;pointer-events:none}
.heat i:hover::after{z-index:10}
article details{border:0!important;padding:.5rem 0 0;font-size:.8125rem;color:var(--quiet)}
details{border-top:1px solid var(--line);padding:.7rem 0}
details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;font-weight:550}
details pre{max-height:none;margin-top:.8rem}
section>.panels+details{margin-top:2.5rem}
details .panels{margin:1.5rem 0 1rem}
footer{margin-top:4rem;font-size:.8125rem;color:var(--quiet)}
@media (max-width:30rem){main{padding:2rem 1.1rem 4rem}h2{margin-top:3rem}
th,td{padding-right:.8rem}th:first-child,td:first-child{min-width:6rem}}
"""
PAGE += _depths()
