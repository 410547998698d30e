"""Would catch: a report that runs or fetches what the web wrote, misstates the tables, or shows empty in a browser."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capfilt.catalog.artefacts import number
from capfilt.catalog.report import SAMPLES_PER_GROUP, write_report
from capfilt.catalog.views import open_catalog
from capfilt.tables.contracts import IMAGES, VERDICTS
from capfilt.tables.manifest import Counts
from capfilt.tables.visible import visible
from capfilt.tables.workspace import Workspace
from tests.refusals import failed, refused

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The elements, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.styles = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data + "\n"

    def values(self, tag: str, attribute: str) -> list[str | None]:
        return [attributes.get(attribute) for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "not yet" / "report.html"
    write_report(workspace, path)
    return path


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def write(workspace: Workspace, path: Path, rule: str = "") -> Page:
    """The page; with `rule` that of this verdicts part alone."""
    for other in workspace.parts("verdicts") if rule else ():
        if other.name != rule:
            shutil.rmtree(other.path)
    write_report(workspace, path)
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    # An allow-list: a tag or attribute that could load, run or navigate would have to be added here first.
    allowed = {
        "html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "div", "span", "p",
        "h1", "h2", "h3", "h4", "b", "i", "code", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption",
        "details", "summary", "dl", "dt", "dd", "img", "svg", "g", "rect", "line", "text", "polyline", "circle",
    }  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert not names & {"href", "xlink:href", "srcset", "action", "style", "srcdoc", "poster", "background"}
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.values("img", "src"))
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    (policy,) = (a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.fixture(scope="module")
def hostile_report(builder, hostile: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report that has the hostile texts wherever a text can come from."""
    folder = tmp_path_factory.mktemp("hostile")
    workspace = builder(folder / "workspace")
    rows = []
    for image, text in enumerate(hostile):
        for place, keep in enumerate((True, False)):
            row = {
                "text_id": f"{image} {place}",
                "image_id": f"{image}",
                "source": "web",
                "text": text,
                "keep": keep,
            }
            rows.append(row | {"itm_score": 0.5, "reason": text})
    part = workspace.part("verdicts", "hostile")
    identity = {"options": {text: [text] for text in hostile}, "threshold": "</style>"}
    mark = part.begin(VERDICTS, "<b>stage", identity)
    part.commit(0, VERDICTS.table(rows), Counts(len(rows), len(rows)), mark, 0.1)
    for name in ("models", "runs"):
        shutil.rmtree(workspace.path / name)
    model = workspace.path / "models" / "<i>m"
    model.mkdir(parents=True)
    lines = [json.dumps({"step": step, hostile[0]: step}) for step in (1, 2)]
    (model / "log.jsonl").write_text("\n".join(lines))
    (model / "config.json").write_text(
        json.dumps({"extra": {"warnings": list(hostile), "stage": hostile[0]}})
    )
    run = {"name": hostile[1], "metrics": {hostile[0]: 1.0}}
    (workspace.path / "runs").mkdir()
    (workspace.path / "runs" / "a.json").write_text(json.dumps(run))
    summary = {"noise": {hostile[0]: 1}, "evaluation": {hostile[0]: {hostile[1]: 1}}, "filter": hostile[0]}
    (workspace.path / "summary.json").write_text(json.dumps(summary))
    # Five images, fewer than a group shows: every text is on the page.
    write(workspace, folder / "r.html", "hostile")
    return folder / "r.html"


def test_hostile_texts_are_shown_as_texts(hostile_report: Path, hostile: tuple[str, ...]) -> None:
    content = hostile_report.read_text(encoding="utf-8")
    page = Page(content)
    assert "script" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("style") == 1
    for text in hostile:
        assert visible(text) in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028]", content)


def test_the_same_workspace_gives_the_same_bytes(workspace: Workspace, report: Path, tmp_path: Path) -> None:
    # Another process has another hash seed and another order of sets.
    code = (
        "import sys; from capfilt.catalog.report import write_report; from capfilt.tables.workspace import Workspace; "
        "write_report(Workspace(sys.argv[1]), sys.argv[2])"
    )
    again = tmp_path / "again.html"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(workspace.path), str(again)], check=True, cwd=root)
    assert again.read_bytes() == report.read_bytes()
    assert str(workspace.path) not in again.read_text()


def test_funnel_numbers_are_those_of_the_manifests(page: Page, workspace: Workspace) -> None:
    for table in ("images", "captions", "scores", "verdicts", "pairs"):
        for part in workspace.parts(table):
            counts = part.counts()
            row = f"{table}/{part.name}\n{counts.rows_in:,}\n{counts.kept:,}\n{sum(counts.dropped.values()):,}\n"
            assert row + f"{sum(counts.failed.values()):,}\n{part.rows:,}\n" in page.text
            for reason, rows in (counts.dropped | counts.failed).items():
                assert f"{reason}, {100 * rows / counts.rows_in:.1f}%" in page.text


def test_yield_names_each_failure_with_an_example(page: Page) -> None:
    text = page.text[page.text.index("\nYield\n") :]
    assert "success\n70\n87.5%\n" in text
    assert "not_found\nfailed_to_download\n5\n6.2%\n<b>not_found</b>" in text


def test_histograms_hold_every_scored_text(page: Page, workspace: Workspace) -> None:
    with open_catalog(workspace) as connection:
        for rule, score in (("capfilt", "itm_score"), ("best", "itc_score")):
            section = page.text[page.text.index(f"Scores and samples: {rule}") :]
            section = section[: section.index("Samples\n")]
            drawn = sum(
                int(k) + int(d) for k, d in re.findall(r"to [-\d.]+: (\d+) kept, (\d+) dropped", section)
            )
            assert (
                drawn
                == connection.execute(
                    f"SELECT count({score}) FROM verdicts WHERE rule = ? AND source IN ('web', 'synthetic')",
                    [rule],
                ).fetchone()[0]
            )
            assert f"Texts are judged by {score}" in section
    assert "kept from 0.5\n" in page.text


def test_samples_are_of_their_group_and_few(page: Page, workspace: Workspace) -> None:
    with open_catalog(workspace) as connection:
        rows = connection.execute(
            "SELECT image_id, bool_or(keep) FILTER (WHERE source = 'web'), "
            "bool_or(keep) FILTER (WHERE source = 'synthetic') "
            "FROM verdicts SEMI JOIN (FROM images WHERE status = 'success') USING (image_id) "
            "WHERE rule = 'capfilt' GROUP BY 1"
        ).fetchall()
    for web in (True, False):
        for synthetic in (True, False):
            size = sum((row[1], row[2]) == (web, synthetic) for row in rows)
            words = {True: "kept", False: "dropped"}
            heading = f"web {words[web]}, synthetic {words[synthetic]} \n{size:,} image"
            assert (heading in page.text) == (size > 0)
    groups = [tag for tag, attributes in page.tags if attributes.get("class") == "samples"]
    cards = [tag for tag, attributes in page.tags if attributes.get("class") == "sample"]
    assert 0 < len(cards) <= SAMPLES_PER_GROUP * len(groups)


def test_each_sample_has_its_own_picture(report: Path) -> None:
    cards = re.findall(r'<article class="sample">.*?</article>', report.read_text())
    assert len(cards) > 10
    for card in cards:
        key = int(re.search(r"synthetic (\d{9})", card)[1])
        if key == 7:
            continue  # planted: cannot be decoded
        data = base64.b64decode(re.search(r'src="data:image/jpeg;base64,([^"]+)"', card)[1])
        with Image.open(io.BytesIO(data)) as picture:
            corner = np.asarray(picture.convert("RGB"))[:4, :4].reshape(-1, 3).mean(0)
        assert np.abs(corner - (20 * key % 256, 90, 200 - key)).max() < 10


def test_pictures_are_small_jpegs_encoded_here(build_workspace: Workspace, tmp_path: Path) -> None:
    part = build_workspace.part("images", "large")
    buffer = io.BytesIO()
    Image.new("RGB", (1200, 600), (10, 200, 30)).save(buffer, "PNG", pnginfo=None)
    row = {
        "image_id": "x",
        "dataset": "large",
        "key": "x",
        "source": "web",
        "captions": ["green"],
        "status": "success",
    }
    mark = part.begin(IMAGES, "ingest", {"version": 1})
    image = {"bytes": buffer.getvalue(), "path": None}
    part.commit(0, IMAGES.table([row | {"image": image}]), Counts(1, 1), mark, 0.1)
    verdict = {"text_id": "t", "image_id": "x", "source": "web", "text": "green", "keep": True, "reason": "r"}
    rule = build_workspace.part("verdicts", "large")
    rule.commit(
        0, VERDICTS.table([verdict]), Counts(1, 1), rule.begin(VERDICTS, "select", {"version": 1}), 0.1
    )
    page = write(build_workspace, tmp_path / "r.html", "large")
    (source,) = page.values("img", "src")
    data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as shown:
        assert (shown.format, shown.size) == ("JPEG", (240, 120))
        assert np.abs(np.asarray(shown.convert("RGB")).mean((0, 1)) - (10, 200, 30)).max() < 4


def test_a_broken_or_absent_picture_is_a_note_not_an_error(
    build_workspace: Workspace, tmp_path: Path
) -> None:
    with open_catalog(build_workspace) as connection:
        (broken,) = connection.execute("SELECT image_id FROM images WHERE key = '000000007'").fetchone()
    verdicts = [
        {
            "text_id": f"{image} t",
            "image_id": image,
            "source": "web",
            "text": "x",
            "keep": True,
            "reason": "r",
        }
        for image in (broken, "elsewhere")
    ]
    part = build_workspace.part("verdicts", "two")
    part.commit(
        0, VERDICTS.table(verdicts), Counts(2, 2), part.begin(VERDICTS, "select", {"version": 1}), 0.1
    )
    page = write(build_workspace, tmp_path / "r.html", "two")
    assert page.values("img", "src") == []
    assert "the picture is not in this workspace" in page.text
    assert re.search("truncated|not_an_image|decode_error", page.text)


def test_curves_runs_summary_and_lineage_are_there(page: Page) -> None:
    assert {"Summary", "Learning curves", "Evaluations", "Lineage"} <= set(page.text.splitlines())
    assert f"pretrained: {number(3 + 2 * math.exp(-59 / 15))} at 59" in page.text
    assert "knows only its prior" not in page.text
    assert "tr@1\n12.5\n" in page.text
    assert "10.25 [9, 11.5]" in page.text
    lineage = page.text[page.text.index("\nLineage\n") :]
    assert "pairs/capfilt\nselect-pairs\nimages/web\nverdicts/capfilt\n" in lineage
    assert "models/pretrained\npretrain\nimages/web\n" in lineage
    # Two options of one name are both there.
    assert "sources\nweb, synthetic\n" in lineage


def test_best_of_each_metric_is_bold(report: Path) -> None:
    content = report.read_text()
    assert '<td class="n"><b>31.0</b></td>' in content
    assert '<td class="n">25.0</td>' in content


def test_scores_without_verdicts_still_have_a_histogram(build_workspace: Workspace, tmp_path: Path) -> None:
    for name in ("verdicts", "pairs", "models", "runs"):
        shutil.rmtree(build_workspace.path / name)
    (build_workspace.path / "summary.json").unlink()
    page = write(build_workspace, tmp_path / "r.html")
    assert "Scores: filter" in page.text
    assert "itm_score of 78 web texts" in page.text
    assert not {"Summary", "Learning curves", "Evaluations"} & set(page.text.splitlines())


def test_models_alone_make_a_report(tmp_path: Path) -> None:
    directory = tmp_path / "w" / "models" / "m"
    directory.mkdir(parents=True)
    (directory / "log.jsonl").write_text('{"step": 1, "itm": 0.7}\n{"step": 2, "itm": 0.6}\n')
    page = write(Workspace(tmp_path / "w"), tmp_path / "r.html")
    assert "no shard yet" in page.text
    assert "knows only its prior" in page.text
    assert "Funnel" not in page.text


def test_wrong_workspaces_and_targets(workspace: Workspace, tmp_path: Path) -> None:
    with refused(tmp_path / "absent"):
        write_report(Workspace(tmp_path / "absent"), tmp_path / "r.html")
    with refused(tmp_path, "parts"):
        write_report(Workspace(tmp_path), tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with failed(tmp_path / "file" / "r.html"):
        write_report(workspace, tmp_path / "file" / "r.html")


def test_a_shard_damaged_inside_is_one_line(build_workspace: Workspace, tmp_path: Path) -> None:
    part = build_workspace.part("images", "damaged")
    image = {"bytes": random.Random(0).randbytes(200_000), "path": None}
    row = {
        "image_id": "x",
        "dataset": "d",
        "key": "x",
        "source": "web",
        "captions": [],
        "status": "failed_to_resize",
    }
    mark = part.begin(IMAGES, "download", {"version": 1})
    part.commit(0, IMAGES.table([row | {"image": image}]), Counts(1, 0, {}, {"truncated": 1}), mark, 0.1)
    # Before the end that the manifest vouches for: the first column's page.
    with (part.path / "00000.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 300)
    with failed("shard --verify"):
        write_report(build_workspace, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium or Chrome on PATH: the report is not opened in a browser")


def browse(chromium: str, page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    base = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    command = [chromium, *base, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, 1), (1280, 0), (420, 1)], ids=["light", "dark", "narrow"]
)
def test_a_browser_shows_it(chromium: str, report: Path, tmp_path: Path, width: int, scheme: int) -> None:
    shot = tmp_path / "shot.png"
    flags = [
        f"--window-size={width},2400",
        f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]
    browse(chromium, report, tmp_path, *flags)
    with Image.open(shot) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    background = pixels[2, 2]
    assert background.tolist() == ([16, 20, 24] if scheme == 0 else [255, 255, 255])
    # Something is drawn in each fifth of the window, and the kept and dropped bars have their colours.
    for part in np.array_split(pixels, 5):
        assert (np.abs(part - background).sum(-1) > 60).mean() > 0.005
    for colour in ((47, 158, 116), (217, 101, 76)) if scheme == 0 else ((23, 130, 92), (210, 85, 61)):
        assert (np.abs(pixels - np.array(colour)).sum(-1) < 12).sum() > 200


def test_a_browser_runs_nothing_of_it(chromium: str, hostile_report: Path, tmp_path: Path) -> None:
    dom = browse(chromium, hostile_report, tmp_path, "--dump-dom").stdout
    assert "<title>workspace: capfilt report</title>" in dom
    assert "owned" in dom
    assert "<script" not in dom
    # The page is whole: nothing closed the style sheet or the body early.
    assert re.search(r"</section></main>\s*</body></html>\s*$", dom)
