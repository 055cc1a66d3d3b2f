"""What answers look like: their tokens, turns, groups, and the controls that find them."""

from __future__ import annotations

LEVELS = 6  # depths of colour of a token


def _depths() -> str:
    """The colours of a token's part in the loss: u (the teacher likes it more), d (less), n (unknown), 1 to LEVELS."""
    colours = {"u": "--more", "d": "--less", "n": "--either"}
    return "".join(
        f".{name}{level}{{background:color-mix(in srgb,var({colour}) {round(60 * level / LEVELS)}%,transparent)}}\n"
        for name, colour in colours.items()
        for level in range(1, LEVELS + 1)
    ) + "".join(f".minimap .{name}{{fill:var({colour})}}\n" for name, colour in colours.items())


ANSWERS = """
.controls{display:flex;flex-wrap:wrap;gap:.5rem .9rem;align-items:center;font-size:.875rem;margin:1rem 0}
.controls input[type=search]{flex:1 1 14rem;min-width:0}
.controls input,.controls select{font:inherit;color:inherit;background:var(--paper);border:1px solid var(--quiet);
border-radius:4px;padding:.3rem .5rem}
.controls label{white-space:nowrap}
.group>summary{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:.1rem 1rem;list-style:none;font-weight:400}
.group>summary::-webkit-details-marker{display:none}
.group>summary>span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.group>summary>span:first-child::before{content:"▸ ";color:var(--quiet)}
.group[open]>summary>span:first-child{white-space:normal}
.group[open]>summary>span:first-child::before{content:"▾ "}
.group>summary>.quiet{white-space:nowrap;font-variant-numeric:tabular-nums;font-size:.8125rem}
.side{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(min(86vw,20rem),1fr);gap:0 1.75rem;overflow-x:auto;
scroll-snap-type:x proximity;scrollbar-width:thin;padding-bottom:.5rem;margin-top:1rem;align-items:start}
.side::-webkit-scrollbar{height:.5rem}
.side::-webkit-scrollbar-thumb{background:var(--arm);border-radius:.25rem}
article{border-top:1px solid var(--line);padding:.9rem 0 1rem;min-width:0;scroll-snap-align:start}
article:target{border-top:2px solid var(--ink)}
article details,.group details{border:0;padding:.5rem 0 0;font-size:.8125rem;color:var(--quiet)}
.chips{display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:.8125rem;color:var(--quiet);
font-variant-numeric:tabular-nums}
.chips bdi{color:var(--ink);overflow-wrap:anywhere}
.chips .outcome,.chips .outcome bdi{color:var(--ink);font-weight:650}
.chips .flag,.flag{color:var(--warn);font-weight:600}
.role{font-size:.75rem;color:var(--quiet);margin:.6rem 0 .1rem;max-width:none}
.answer{font:.8125rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;padding:.5rem .7rem}
.heat,pre.answer{background:var(--wash);border-radius:4px;max-height:34rem;overflow:auto;scrollbar-width:thin}
pre.peer{border-left:3px solid var(--line);padding:.2rem 0 .2rem .7rem}
.own{font-weight:600}
.turn{border-left:3px solid var(--student);padding-left:.6rem;margin:.35rem 0 0}
.turn.t1{border-left:3px double var(--teacher)}
.turn.t2,.turn.t3{border-left:3px dotted var(--quiet)}
.turn>.role{margin:0 0 .1rem;font-family:system-ui,sans-serif}
.turn.t2>div,.turn.t3>div{font-style:italic}
.heat i{font-style:normal;border-radius:2px;cursor:default}
.heat i:focus-visible{outline:none}
.heat details,.heat details:last-of-type{border:0!important;padding:0;font:inherit;color:inherit}
.heat summary{font:inherit;font-weight:400;display:grid;grid-template-columns:3.4rem minmax(0,1fr);list-style:none;
border-radius:2px;scroll-margin-top:4.5rem}
.heat summary::-webkit-details-marker{display:none}
.heat summary>b{font:.6875rem/1.9 system-ui,sans-serif;color:var(--quiet);font-variant-numeric:tabular-nums}
.heat details[open]>summary{background:none}
.heat details[open]>summary>span{height:1.3em;overflow:hidden;opacity:.45}
.heat details>div{margin:0 0 .3rem 3.4rem}
.minimap{position:sticky;top:0;z-index:2;background:var(--wash);padding:.4rem .7rem .3rem;
border-bottom:1px solid var(--line)}
.minimap rect.hit{fill:transparent}
.minimap a:hover .hit,.minimap a:focus .hit{fill:color-mix(in srgb,var(--ink) 18%,transparent)}
.minimap .masked{fill:var(--line)}
.legend i{font:.8125rem ui-monospace,monospace;border-radius:2px;padding:0 .15rem;color:var(--ink)}
.o{color:color-mix(in srgb,var(--ink) 55%,transparent)}
.m{color:var(--quiet);border-bottom:1px dotted var(--quiet)}
.x{box-shadow:inset 0 -2px var(--ink)}
.heat i:hover,.heat i:focus{box-shadow:0 0 0 1.5px var(--ink);position:relative;z-index:1}
.heat i:hover::after,.heat i:focus::after{content:attr(data-t);position:fixed;z-index:9;left:0;right:0;bottom:0;
padding:.7rem 1.1rem calc(.8rem + env(safe-area-inset-bottom));background:var(--wash);color:var(--ink);
border-top:1px solid var(--quiet);font:.8125rem/1.5 system-ui,sans-serif;white-space:pre-wrap;pointer-events:none}
.heat i:hover::after{z-index:10}
@media (min-width:86rem){.side{margin-right:calc(31.5rem - 50vw)}}
@media print{.heat,pre.answer{max-height:none;overflow:visible}.heat i:focus::after{content:none}.side{display:block}}
"""
ANSWERS += _depths()
