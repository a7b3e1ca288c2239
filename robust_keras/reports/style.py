"""The style of a page: dark and light as the reader has it, narrow and wide, and on paper."""

# Colours differ in lightness too, and have a contrast of 3 or more against their ground; text has 4.5 or more.
CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #4f5864; --line: #c9ced6; --link: #0b57a4;
  --grid: #c9ced6; --clean: #0072b2; --robust: #a04a00; --lost: #7d8590; --other: #00704f; --alert: #fff0e0;
  --alert-line: #a04a00; --shade: 0 114 178;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --card: #1d2126; --ink: #e7eaee; --soft: #b3bcc8; --line: #454d58; --link: #8ec5ff;
    --grid: #454d58; --clean: #5cb8f0; --robust: #ffb057; --lost: #8f98a5; --other: #3fd0a0; --alert: #3a2a14;
    --alert-line: #ffb057; --shade: 92 184 240;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
header, main, footer { max-width: 74rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.25rem 0 .5rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1.08rem; margin: 1.75rem 0 .4rem; overflow-wrap: anywhere; }
p, li, figcaption, summary { max-width: 46rem; overflow-wrap: anywhere; }
figcaption, caption { color: var(--soft); font-size: .92rem; text-align: left; }
caption { padding: .3rem 0; }
caption span { display: block; position: sticky; left: 0; max-width: min(46rem, calc(100vw - 3rem)); }
a { color: var(--link); }
code {
  font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  unicode-bidi: isolate;
}
nav ul { padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; }
.skip { position: absolute; left: -100rem; }
.skip:focus { position: static; }
.alert { background: var(--alert); border-left: .3rem solid var(--alert-line); padding: .5rem .8rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
.wide:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { white-space: nowrap; }
td, tbody th { max-width: 26rem; min-width: 3rem; }
tbody th { font-weight: 600; }
tbody :is(th, td):has(code) { min-width: 7rem; }
.short { white-space: nowrap; }
code:not(.short) { overflow-wrap: anywhere; }
.shaded td { text-align: right; min-width: 2.4rem; }
figure { margin: .8rem 0; }
svg { display: block; width: 100%; max-width: 38rem; height: auto; color: var(--ink); }
.grid { display: flex; flex-wrap: wrap; gap: 1rem; margin: .8rem 0; padding: 0; list-style: none; }
.grid > li { background: var(--card); border: 1px solid var(--line); border-radius: .3rem; padding: .5rem; }
.grid img { width: 6rem; height: auto; image-rendering: pixelated; display: inline-block; margin-right: .2rem; }
.grid div { font-size: .88rem; max-width: 19rem; overflow-wrap: anywhere; }
details { margin: .4rem 0; }
pre { overflow-x: auto; background: var(--card); padding: .6rem; font-size: .85rem; max-height: 30rem; }
footer { color: var(--soft); padding-bottom: 2rem; }
@media (max-width: 30rem) { .grid img { width: 5.4rem; } }
@media print {
  :root {
    --ground: #ffffff; --card: #ffffff; --ink: #000000; --soft: #333333; --line: #999999; --link: #000000;
    --grid: #cccccc; --clean: #0072b2; --robust: #a04a00; --lost: #7d8590; --other: #00704f; --alert: #ffffff;
    --alert-line: #000000; --shade: 0 114 178;
  }
  nav, .skip { display: none; }
  figure, tr, .grid > li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
  details:has(table)::details-content { content-visibility: visible; display: block; }
}
""" + "".join(f".s{k} {{ background: rgb(var(--shade) / {0.05 * k:.2f}); }}\n" for k in range(1, 10))
