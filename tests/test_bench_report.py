"""What is made of a bench run afterwards: its JSON is held to a schema, two of them are compared, one becomes a page."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastattn
from fastattn.bench import __main__ as cli
from fastattn.bench import compare, peaks, schema
from fastattn.bench.case import Goal, Implementation
from fastattn.bench.cases import softmax
from fastattn.bench.report import charts, page, svg

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
BROWSERS = (os.environ.get("FASTATTN_TEST_BROWSER"), "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, filter(None, BROWSERS))), None)


def cases():
    """Two lengths of two directions, so that every chart has something to show."""
    found = []
    for L in (16, 32):
        for backward in (False, True):
            problem = softmax.square(L, H=2, D=8, causal="top_left")
            name = f"{'backward' if backward else 'forward'} L{L}"
            found.append(softmax.case(name, problem, "fp32", Goal(1.5, 0.5), backward=backward, presets=("quick",)))
    return found


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """Runs the cases with fastattn, and its baseline, slowed down by so many seconds, or replaced; returns the path of the JSON."""
    monkeypatch.setattr(cli, "all_cases", cases)
    monkeypatch.setattr(peaks, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(peaks, "READ_BYTES", 1 << 20)
    honest = softmax.implementations

    def run(name: str, delay: float = 0.0, call=None, baseline_delay: float = 0.0) -> Path:
        def after(seconds):
            def attend(x):
                time.sleep(seconds)
                return fastattn.attention(x.q, x.k, x.v, causal=True)

            return Implementation(attend)

        def replaced(case, *rest):
            slow = {"torch": after(baseline_delay)} if baseline_delay else {}
            return honest(case, *rest) | slow | {"fastattn": Implementation(call) if call else after(delay)}

        monkeypatch.setattr(softmax, "implementations", replaced)
        path = tmp_path / f"{name}.json"
        cli.main(["run", "--preset", "quick", "--case", "forward", "--rounds", "9", "--json", str(path)])
        return path

    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One real run of all cases, with a peer that is not there."""
    path = tmp_path_factory.mktemp("report") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "all_cases", cases)
        patch.setattr(peaks, "WINDOW_SECONDS", 0.01)
        patch.setattr(peaks, "READ_BYTES", 1 << 20)
        options = ["--rounds", "5", "--impl", "math,eager,flash_attn", "--json", str(path)]
        assert cli.main(["run", "--preset", "quick", *options]) == 0
    return schema.load(path)


def test_a_run_is_valid_and_survives_json(report):
    assert schema.problems(report) == [] and schema.problems(json.loads(json.dumps(report))) == []
    one = report["results"][0]["implementations"]["fastattn"]
    assert one["ms"]["low"] <= one["ms"]["median"] <= one["ms"]["high"] and one["extra_bytes"] >= 0
    assert report["results"][0]["implementations"]["flash_attn"]["reason"].startswith("flash_attn is not installed")


@pytest.mark.parametrize("breakage, message", [
    (lambda r: r.pop("environment"), "report.environment is missing"),
    (lambda r: r["results"][1].update(flops="many"), r"results\[1\].flops is str, not int or float"),
    (lambda r: r["results"][0]["implementations"]["torch"].update(status="fine"), "torch.status is 'fine'"),
    (lambda r: r["results"][0]["implementations"]["torch"]["ms"].pop("median"), "torch.ms.median is missing"),
    (lambda r: r["results"][0].update(flops=float("nan")), "flops is nan"),
    (lambda r: r["results"][0].update(ratio_met=1), "ratio_met is int"),
    (lambda r: r["results"][0].update(flops=True), "flops is bool"),
    (lambda r: r.update(results={}), "report.results is dict, not list"),
    (lambda r: r.update(schema_version=3), "schema_version is 3"),
    (lambda r: r.update(peaks=[]), "peaks is list, not an object"),
])  # fmt: skip
def test_what_breaks_the_schema_is_named(report, breakage, message):
    broken = copy.deepcopy(report)
    breakage(broken)
    assert any(re.search(message, problem) for problem in schema.problems(broken)), schema.problems(broken)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_are_read(path):
    """Whatever version they are of; what was not recorded stays null."""
    stored, loaded = json.loads(path.read_text()), schema.load(path)
    assert schema.problems(loaded) == [] and len(loaded["results"]) == len(stored["results"])
    if stored["schema_version"] == 1:
        every = [one for result in loaded["results"] for one in result["implementations"].values()]
        assert {one["extra_bytes"] for one in every} == {None}
        assert {one["ms"]["low"] for one in every if one["ms"]} == {None}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "results": [{}]}', "\x00"]
)
def test_what_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="bad.json: not"):
        schema.load(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, report):
    path = tmp_path / "run.json"
    schema.save(report, path)
    before = path.read_text()
    with pytest.raises(ValueError):
        schema.save(report | {"seconds": float("nan")}, path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_compare_flags_a_deliberately_slow_implementation(run_bench, capsys):
    # Both sleep: on a busy machine the time of a call of microseconds is anything.
    fast, slow = (run_bench(name, delay, baseline_delay=0.02) for name, delay in (("fast", 0.02), ("slow", 0.08)))
    assert cli.main(["compare", str(fast), str(slow), "--fail-if-slower", "5%"]) == 1
    assert "2 slower" in capsys.readouterr().out
    assert cli.main(["compare", str(fast), str(slow), "--fail-if-slower", "0.05", "--relative"]) == 1
    assert cli.main(["compare", str(slow), str(fast), "--fail-if-slower", "5%"]) == 0
    assert "2 faster" in capsys.readouterr().out
    assert cli.main(["compare", str(fast), str(slow)]) == 0  # nobody asked to fail
    assert cli.main(["compare", str(fast), str(fast), "--fail-if-slower", "5%"]) == 0


def test_compare_fails_what_became_wrong_or_was_lost(run_bench):
    def missing(x):
        raise fastattn.UnsupportedError("gone")

    fast, wrong = run_bench("fast"), run_bench("wrong", call=lambda x: x.q * 0)
    assert cli.main(["compare", str(fast), str(wrong), "--fail-if-slower", "5%"]) == 1
    assert cli.main(["compare", str(fast), str(run_bench("lost", call=missing)), "--fail-if-slower", "5%"]) == 1


def result(median, low, high, **more):
    quantiles = {"median": median, "p20": low, "p80": high, "iqr": high - low, "low": low, "high": high, "rounds": 9}
    ours = {"status": "ok", "reason": "", "ms": quantiles}
    return {"case": "x", "implementations": {"fastattn": ours}, "ratio": quantiles | more}


@pytest.mark.parametrize("new, verdict", [
    ((1.2, 1.19, 1.21), "slower"), ((1.2, 1.0, 1.4), "unclear"), ((1.04, 1.039, 1.041), "same"), ((0.8, 0.79, 0.81), "faster"),
    ((1.0, 0.5, 3.0), "unclear"), ((1.06, 1.04, 1.08), "unclear"),
])  # fmt: skip
def test_compare_judges_by_intervals(new, verdict):
    assert compare.change(result(1.0, 0.999, 1.001), result(*new), 0.05, relative=False).verdict == verdict
    # A ratio of the baseline that falls is what a time that rises is.
    inverse = tuple(1 / x for x in (new[0], new[2], new[1]))
    assert compare.change(result(1.0, 0.999, 1.001), result(*inverse), 0.05, relative=True).verdict == verdict


def test_compare_reads_old_files_by_iqr_and_rounds(capsys):
    quantiles = {"median": 10.0, "iqr": 3.0, "rounds": 9, "low": None, "high": None}
    assert compare.interval(quantiles) == pytest.approx((10 - 1.57, 10 + 1.57))
    old = str(ROOT / "bench" / "results" / "cpu.json")
    assert cli.main(["compare", old, old, "--fail-if-slower", "50%"]) == 0
    assert "22 same" in capsys.readouterr().out
    assert cli.main(["compare", old, str(RESULTS[-1]), "--fail-if-slower", "5%"]) == 1  # nothing in common
    assert "nothing to compare" in capsys.readouterr().out


def test_compare_names_another_machine(report):
    other = copy.deepcopy(report)
    other["environment"]["cpu"]["model"], other["environment"]["threads"] = "abacus", 99
    found = compare.differences(report, other)
    assert len(found) == 2 and "abacus now" in found[0] and "99 now" in found[1]


class Page(HTMLParser):
    """Collects texts, images' texts, and what should not be there; dies on tags that do not nest."""

    VOID = {"meta", "link", "br"}

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.clipped: list[str] = []
        self.inside: dict | None = None
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "svg":
            self.image = [float(x) for x in attributes["viewbox"].split()]
        self.inside = attributes if tag == "text" else None
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"
        if self.inside is not None and "transform" not in self.inside:
            self._note_clipping(data)

    def _note_clipping(self, data: str) -> None:
        """Texts that leave their image, taking letters as wide as they get."""
        place, size = float(self.inside["x"]), 6.2 * len(data)
        start = place - size * {"start": 0, "middle": 0.5, "end": 1}[self.inside["text-anchor"]]
        if start < 0 or start + size > self.image[2] or not 0 < float(self.inside["y"]) < self.image[3]:
            self.clipped.append(data)


def test_the_page_is_whole_and_needs_no_network(report):
    source = page.html(report, "run.json")
    parsed = Page(source)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "img", "iframe", "object"} and "@import" not in source and "url(" not in source
    links = {value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("href", "src")}
    assert links == {"data:,"}
    assert not [
        value for _, attributes in parsed.tags for value in attributes.values() if value and "nan" in value.lower()
    ]
    for title in (
        "Speed against length",
        "How many times faster",
        "Roofline",
        "Memory against length",
        "Errors",
        "Environment",
    ):
        assert title in parsed.text
    assert len([tag for tag, _ in parsed.tags if tag == "svg"]) == 2 + 1 + 1 + 2
    assert all(result["case"] in parsed.text for result in report["results"])
    assert report["environment"]["cpu"]["model"] in parsed.text and "flash_attn is not installed" in parsed.text
    assert "prefers-color-scheme:dark" in source
    assert parsed.clipped == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_become_pages_without_clipped_labels(path):
    assert Page(page.html(schema.load(path), path.name)).clipped == []


def test_names_are_escaped_and_wrong_is_red(report):
    odd = copy.deepcopy(report)
    odd["results"][0]["case"] = "<script>alert(1)</script>"
    odd["results"][0]["implementations"]["eager"] |= {
        "status": "wrong",
        "reason": "off & away",
        "ms": None,
        "rate": None,
    }
    source = page.html(odd, "<run>")
    assert "<script>" not in source and "&lt;script&gt;" in source and "off &amp; away" in source
    assert ("td", {"class": "bad"}) in Page(source).tags


def test_bars_are_held_against_whom_the_goal_names(report):
    results = copy.deepcopy(report["results"][:1])
    assert [bar.label for bar in page.bars(results)] == ["forward L16, vs torch"]
    results[0]["goal"]["against"] = "math"
    (bar,) = page.bars(results)
    assert bar.label == "forward L16, vs math"
    assert bar.ratio == results[0]["implementations"]["math"]["ours_faster"]["median"]


def test_a_page_of_nothing_but_an_environment(report):
    empty = report | {"results": [], "peaks": None, "interrupted": True}
    assert "interrupted after" in Page(page.html(empty, "x")).text


def test_models_memory_and_masks_have_sections(report):
    stored = {name: schema.load(ROOT / "bench" / "results" / f"{name}.json") for name in ("cpu", "masks", "linear")}
    extras = {"memory": stored["cpu"]["memory"], "gpt": stored["cpu"]["gpt"], "lm": stored["linear"]["lm"]}
    full = copy.deepcopy(report | extras | {"mask_building": stored["masks"]["mask_building"]})
    parsed = Page(page.html(full, "x"))
    titles = "A GPT on real text", "A language model on real text", "Memory of one long call", "Building a mask"
    words = parsed.text.splitlines()
    assert set(titles) <= set(words) and not set(titles) & set(Page(page.html(report, "x")).text.splitlines())
    svgs = [tag for tag, _ in parsed.tags].count("svg") - 6
    assert svgs == len(full["gpt"]) + 1 and parsed.clipped == []
    for run in full["gpt"]:
        assert f"{run['tokens_per_second']['fastattn']:.0f}" in words and run["precision"] in words
    assert f"{full['lm']['held_out_loss']['gated delta net']:.4f}" in words
    assert f"{full['memory']['extra_bytes'] / 2**20:.1f}" in words and "1048576 tokens" in words
    assert "DIFFERENT" not in words
    full["gpt"][0]["loss_agrees"] = full["lm"]["generated"]["softmax"]["agree"] = False
    full["memory"] = {"case": "long", "status": "wrong", "reason": "an identity is broken"}
    source = page.html(full, "x")
    assert all(f'<td class="bad">{word}' in source for word in ("DISAGREE", "DIFFERENT", "WRONG"))
    assert "an identity is broken" in source


def test_what_was_not_checked_is_named_among_the_errors(report):
    other = copy.deepcopy(report)
    result = other["results"][0]
    result["implementations"][result["baseline"]] |= {"rms_error": None, "max_error": None}
    words = Page(page.html(other, "x")).text.splitlines()
    errors = words[words.index("Errors") :]
    assert result["case"] in errors and "not checked" in errors and "it computes something else" in errors


def test_axes_have_round_ticks():
    assert svg.Scale(0, 97, 0, 1).ticks() == [0, 20, 40, 60, 80]
    assert svg.Scale(0.7, 60, 0, 1, log=True).ticks() == [1, 2, 5, 10, 20, 50]
    assert svg.Scale(1, 10, 0, 90, log=True)(10) == pytest.approx(90)
    assert [svg.length(x) for x in (77, 512, 1024, 16384)] == ["77", "512", "1k", "16k"]
    numbers = (0.1234, 12.34, 99.9, 1234.0, 12345.0, 1e6)
    assert [svg.short(x) for x in numbers] == ["0.123", "12.3", "100", "1234", "12.3k", "1M"]
    assert svg.Scale(0.9, 1.3, 0, 1, log=True).ticks() == pytest.approx([0.9, 1.0, 1.1, 1.2, 1.3])
    assert svg.rate(5e5, "GFLOP/s") == (500, "TFLOP/s") and svg.rate(5e5, "GB/s") == (5e5, "GB/s")
    bars = [charts.Bar("slow", 0.5, 0.4, 0.6, 1.0), charts.Bar("fast", 20.0, 19.0, 21.0)]
    assert "var(--bad)" in charts.ratios("t", bars) and "0.50x" in charts.ratios("t", bars)


def browse(file: Path, picture: Path, scheme: str) -> str:
    """Screenshot of a page; what its console said."""
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1240,1600",
    ]
    # 0 is dark, 1 light
    command += [
        f"--blink-settings=preferredColorScheme={'light dark'.split().index(scheme) ^ 1}",
        f"--screenshot={picture}",
    ]
    done = subprocess.run([*command, f"file://{file}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and picture.exists(), done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH or in FASTATTN_TEST_BROWSER")
def test_the_page_renders_in_chromium_without_console_errors(tmp_path, report):
    Image = pytest.importorskip("PIL.Image")
    file = tmp_path / "report.html"
    file.write_text(page.html(report, "run.json"))
    shades = {}
    for scheme in ("light", "dark"):
        assert browse(file, tmp_path / f"{scheme}.png", scheme) == ""
        with Image.open(tmp_path / f"{scheme}.png") as picture:
            pixels = picture.convert("RGB")
            shades[scheme] = sum(pixels.getpixel((5, 5))) / 3
            assert len(pixels.getcolors(1 << 22)) > 100  # something is drawn
    assert shades["light"] > 200 and shades["dark"] < 50
    file.write_text("<script>console.error('seen')</script>")
    assert "seen" in browse(file, tmp_path / "control.png", "light")  # or the test above would see nothing
