"""The report's style sheet: system fonts, light and dark, one column on a phone.

Series colours follow Okabe and Ito (2008), told apart with every common colour blindness; the light
page has them darker and the dark page lighter, for contrast.
"""

CSS = """
:root{color-scheme:light dark;
--paper:#fbfbf9;--card:#fff;--ink:#1b1f24;--soft:#59616b;--rule:#e2e3df;--faint:#f2f2ee;
--mark:#ffe08a;--mark-ink:#1b1f24;--link:#005a8f;
--c0:#0072b2;--c1:#d55e00;--c2:#008f68;--c3:#b5588f;--c4:#6b7280;--c5:#8a6d00;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{
--paper:#13161a;--card:#1a1e23;--ink:#e6e8ea;--soft:#a3abb4;--rule:#2e343b;--faint:#20252b;
--mark:#e0b93a;--mark-ink:#16130a;--link:#7cc4f0;
--c0:#56b4e9;--c1:#f28c3a;--c2:#2fbf94;--c3:#dd93ba;--c4:#aeb4bc;--c5:#e8d84a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans);
overflow-wrap:anywhere}
.page{max-width:1180px;margin:0 auto;padding:clamp(1.5rem,5vw,4rem) clamp(1rem,4vw,2.5rem) 4rem}
h1,h2,h3,h4{line-height:1.25;margin:0;text-wrap:balance}
h1{font-size:clamp(1.75rem,4.5vw,2.6rem);font-weight:680;letter-spacing:-.022em}
h2{font-size:1.4rem;font-weight:650;letter-spacing:-.012em;margin:0 0 .35rem}
h3{font-size:1.02rem;font-weight:650;margin:0}
h4{font-size:.82rem;font-weight:650;margin:0 0 .4rem}
p{margin:0}
a{color:var(--link);text-underline-offset:.2em}
section{margin-top:clamp(2.8rem,6vw,4.5rem)}
.eyebrow{font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);
margin-bottom:.7rem}
.lead{font-size:clamp(1.06rem,2vw,1.22rem);line-height:1.5;max-width:62ch;margin-top:1rem}
.note{color:var(--soft);font-size:.9rem;max-width:74ch}
.note+.scroll,h3+.scroll{margin-top:.8rem}
nav{margin-top:1.6rem;font-size:.92rem;display:flex;flex-wrap:wrap;gap:.3rem 1.3rem}
.path{list-style:none;display:flex;flex-wrap:wrap;gap:.45rem .55rem;align-items:center;
padding:0;margin:1.8rem 0 .7rem;font-size:.92rem}
.path li{border:1px solid var(--rule);background:var(--card);border-radius:8px;
padding:.3rem .7rem;white-space:nowrap}
.path li.model{background:var(--ink);color:var(--paper);border-color:var(--ink)}
.path li.arrow{border:0;background:none;padding:0;color:var(--soft)}
.path i{font-family:Georgia,"Times New Roman",serif;font-size:1.05em}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,9.6rem),1fr));
gap:1.1rem 1.5rem;margin:2rem 0 0;padding:1.3rem 0;border-block:1px solid var(--rule)}
.facts dt{font-size:.8rem;color:var(--soft)}
.facts dd{margin:.1rem 0 0;font-weight:560;font-variant-numeric:tabular-nums}
.group{margin-top:2.2rem}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:12px;background:var(--card)}
.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px}
/* Fixed, so that the columns of all tables stand below one another. */
table.metrics{border-collapse:collapse;table-layout:fixed;width:100%;font-size:.94rem;
--first:14rem;min-width:calc(var(--first) + var(--columns)*8.4rem)}
.metrics th,.metrics td{padding:.75rem .9rem;text-align:left;vertical-align:top;
border-top:1px solid var(--rule)}
.metrics thead th{border-top:0;font-size:.84rem;font-weight:600;vertical-align:bottom}
.metrics thead th:first-child{width:27%}
.metrics th:first-child{position:sticky;left:0;background:var(--card)}
.metrics thead th.strips{width:10.4rem}
.metrics tbody th{font-weight:600}
.metrics tbody th span{display:block;font-weight:400;font-size:.84rem;line-height:1.42;
color:var(--soft);margin-top:.15rem}
.metrics .better{display:inline-block;font-weight:400;font-size:.78rem;color:var(--soft)}
.metrics td{font-variant-numeric:tabular-nums;white-space:nowrap}
.metrics td.none{color:var(--soft)}
.metrics td strong{font-weight:700}
.metrics td small{display:block;font-size:.78rem;color:var(--soft);margin-top:.1rem}
.key{display:inline-block;width:.68em;height:.68em;border-radius:50%;margin-right:.45em;
background:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}
.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
svg{display:block}
.strip{margin-top:.1rem}
.whisker{stroke:currentColor;stroke-width:2;stroke-linecap:round;opacity:.6}
.dot{fill:currentColor}
.axis{stroke:var(--soft);stroke-width:1;opacity:.6}
.grid{stroke:var(--rule);stroke-width:1}
.marker{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4}
.tick,.label{font:11.5px var(--sans);fill:var(--soft);font-variant-numeric:tabular-nums}
.halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}
.line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.area{fill:currentColor;fill-opacity:.1;stroke:currentColor;stroke-width:1.7;
stroke-linejoin:round}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19.5rem),1fr));
gap:2.4rem 2.2rem;margin-top:1.6rem}
figure{margin:0;min-width:0}
.chart{width:100%;height:auto;margin-top:.5rem}
.legend{list-style:none;padding:0;margin:.35rem 0 0;display:flex;flex-wrap:wrap;
gap:.1rem 1rem;font-size:.84rem}
.legend b{font-weight:400;color:var(--soft);font-variant-numeric:tabular-nums;margin-left:.3em}
figure .note{font-size:.84rem;margin-top:.3rem}
.example{display:grid;grid-template-columns:minmax(0,1.65fr) minmax(0,1fr);gap:1.2rem 2.2rem;
background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:1.25rem 1.4rem;margin-top:1.1rem}
.example header{grid-column:1/-1;display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;align-items:baseline}
.chips{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:0;font-size:.86rem}
.chips div{display:flex;gap:.4em}
.chips dt{color:var(--soft)}
.chips dd{margin:0;font-variant-numeric:tabular-nums;font-weight:600}
.text{white-space:pre-wrap;unicode-bidi:isolate;display:block}
.context{margin-bottom:1.1rem}
mark{background:var(--mark);color:var(--mark-ink);border-radius:4px;padding:.08em .18em;
box-decoration-break:clone;-webkit-box-decoration-break:clone}
.dim{color:var(--soft)}
.readings{margin:0}
.readings>div{border-left:3px solid var(--rule);padding:.05rem 0 .05rem .85rem;margin-top:.75rem}
.readings>div[class]{border-left-color:currentColor}
.readings dt{font-size:.8rem;color:var(--soft)}
.readings dd{margin:0;color:var(--ink)}
.readings .other dd{color:var(--soft)}
.readings .other{color:var(--rule)}
.predictions{display:grid;grid-template-columns:1fr 1fr;gap:.2rem 1.4rem;align-content:start}
.predictions>p{grid-column:1/-1;font-size:.8rem;color:var(--soft);margin-bottom:.35rem}
.top{list-style:none;margin:0;padding:0;font-size:.86rem}
.top li{margin-top:.32rem}
.top div{display:flex;justify-content:space-between;gap:.6rem}
.top code{white-space:pre-wrap}
.top span{color:var(--soft);font-variant-numeric:tabular-nums}
.bar{display:block;height:4px;border-radius:2px;background:var(--faint);overflow:hidden}
.bar i{display:block;height:100%;background:var(--soft);border-radius:2px}
.heat{margin-top:1rem;line-height:2;background:var(--card);border:1px solid var(--rule);
border-radius:12px;padding:1rem 1.1rem;white-space:pre-wrap}
.hot{border-radius:4px;padding:.12em .16em;cursor:pointer}
.hot:hover,.hot:focus{outline:2px solid var(--link);outline-offset:1px}
.cold{color:var(--soft)}
.h0{background:transparent}
.h1{background:color-mix(in srgb,var(--c1) 12%,transparent)}
.h2{background:color-mix(in srgb,var(--c1) 24%,transparent)}
.h3{background:color-mix(in srgb,var(--c1) 38%,transparent)}
.h4{background:color-mix(in srgb,var(--c1) 54%,transparent)}
.h5{background:color-mix(in srgb,var(--c1) 72%,transparent)}
.swatch{display:inline-block;width:1em;height:1em;border:1px solid var(--rule);border-radius:3px;
margin-right:.4em;vertical-align:-.12em}
.tip{display:none}
.hot:hover .tip,.hot:focus .tip{display:block;position:fixed;z-index:2;left:0;right:0;bottom:0;
background:var(--ink);color:var(--paper);padding:.9rem clamp(1rem,4vw,2.5rem);line-height:1.4;
white-space:normal}
/* The one under the pointer is in front of the one that has the focus. */
.hot:hover .tip{z-index:3}
.tip .says{margin:0 1em}
.tip i{opacity:.75;font-style:normal;font-variant-numeric:tabular-nums}
code{font-family:var(--mono);font-size:.92em}
details{margin-top:1.3rem}
summary{cursor:pointer;color:var(--link);font-weight:560;width:fit-content}
.config{columns:2 25rem;column-gap:2.6rem;margin-top:1.1rem}
.config section{break-inside:avoid;margin:0 0 1.5rem}
.config table{border-collapse:collapse;width:100%;font-size:.84rem;table-layout:fixed}
.config th,.config td{text-align:left;font-weight:400;vertical-align:top;
padding:.22rem .4rem .22rem 0;border-top:1px solid var(--rule)}
.config th{color:var(--soft);width:46%}
.config td{font-family:var(--mono);font-size:.92em;white-space:pre-wrap}
.notes{padding-left:1.2rem;max-width:74ch;margin:.6rem 0 0}
.notes li{margin-top:.45rem}
@media (max-width:46rem){
.example{grid-template-columns:minmax(0,1fr);padding:1.1rem 1rem}
table.metrics{--first:10.5rem}
.metrics thead th:first-child{width:var(--first)}
.metrics th,.metrics td{padding:.65rem .7rem}
}
@media print{body{background:#fff}.scroll{overflow:visible}.example,figure{break-inside:avoid}}
"""
