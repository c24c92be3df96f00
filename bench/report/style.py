"""Colours and type of the report and of single charts, light and dark."""

LIGHT = {
    "page": "#f4f3ef", "surface": "#fdfdfb", "ink": "#1c1b19", "muted": "#605e58", "grid": "#e4e2dc", "axis": "#a9a69d",
    "good": "#00701a", "bad": "#c22a2a", "s0": "#2a78d6", "s1": "#eb6834", "s2": "#1baf7a", "s3": "#4a3aa7",
    "s4": "#e87ba4", "s5": "#d99400", "s6": "#008300", "s7": "#e34948", "s8": "#8a877f",
}  # fmt: skip
DARK = {
    "page": "#121211", "surface": "#1b1b19", "ink": "#f2f1ec", "muted": "#b3b0a7", "grid": "#32312d", "axis": "#6a6861",
    "good": "#5cc873", "bad": "#ff7b75", "s0": "#4a94ee", "s1": "#e2703f", "s2": "#22b080", "s3": "#9c92f0",
    "s4": "#d9608f", "s5": "#d09320", "s6": "#3fae3f", "s7": "#ea6f6f", "s8": "#8f8c84",
}  # fmt: skip
SERIES = 8  # colours that tell implementations apart; whatever comes after shares the next one, a grey


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


CHART = """
text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
text.tick{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
text.label{font-size:11px;fill:var(--muted)} text.title{font-size:13px;font-weight:600}
text.value{font-size:11px;font-variant-numeric:tabular-nums}
line.grid{stroke:var(--grid)} line.axis{stroke:var(--axis)} line.whisker{stroke:var(--ink);stroke-width:1.5}
line.goal{stroke:var(--ink);stroke-width:2} rect.surface{fill:var(--surface)}
path.line{fill:none;stroke-width:2;stroke-linejoin:round} path.roof{fill:none;stroke:var(--muted);stroke-width:1.5}
circle{stroke:var(--surface);stroke-width:1.5} circle.hollow{fill:var(--surface);stroke-width:2}
"""
THEMES = f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"

PAGE = """
*{box-sizing:border-box} body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px} h1{font-size:24px;margin:0 0 2px} h2{font-size:18px;margin:36px 0 4px}
p{margin:4px 0 12px;max-width:80ch} .muted{color:var(--muted)} code{font-size:13px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0 4px} .tile,.card{background:var(--surface);border:1px solid var(--grid);border-radius:8px}
.tile{padding:10px 16px;min-width:130px} .tile b{display:block;font-size:24px;font-weight:600;line-height:1.2} .tile span{color:var(--muted);font-size:13px}
.good{color:var(--good)} .bad{color:var(--bad);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(520px,100%),1fr));gap:14px}
.card{padding:12px;overflow-x:auto} .card svg{display:block;max-width:none} .wide{margin-top:10px}
table{border-collapse:collapse;font-size:13px;width:100%} th{text-align:left;color:var(--muted);font-weight:500;white-space:nowrap}
th,td{padding:4px 10px 4px 0;border-bottom:1px solid var(--grid);vertical-align:top} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.first td{border-top:1px solid var(--axis)} td.case{min-width:180px} td.goal{white-space:nowrap} td.why{color:var(--muted)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;font-size:14px} dt{color:var(--muted)} dd{margin:0;overflow-wrap:anywhere}
"""
