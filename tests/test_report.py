"""The report: one page, self-contained, that shows what it was given and escapes it; scores on a screen."""

import base64
import io
import re

import numpy as np
from PIL import Image

from mplug2.console import Console
from mplug2.report import Exhibit, Report, Saying
from mplug2.scores import Results, Score

SCORE = {"metric": "accuracy", "value": 0.875, "low": 0.8, "high": 0.93, "blind": 0.25, "chance": 0.2, "n": 9}


def page(**given) -> str:
    defaults = {"title": "a <title>", "about": ["made here"], "scores": {"ours": {"image_answer": SCORE}}}
    return Report(**{**defaults, **given}).html()


def test_a_page_needs_nothing_from_elsewhere():
    clip = np.zeros((2, 4, 4, 3), np.uint8)
    html = page(exhibits=[Exhibit(clip, {"ours": [Saying("", "a one", "a one")]})], curves={"a": [(1, 2.0)]})
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "a &lt;title&gt;" in html and "<title>a <title>" not in html


def test_where_there_is_no_score_or_interval_stands_why():
    none = SCORE | {"value": None, "low": None, "high": None, "why": "one <example> alone"}
    row = re.search(r"<tr><td>cider.*?</tr>", page(scores={"ours": {"cider": none}}))
    assert row and "<b>&ndash;</b>" in row[0] and "one &lt;example&gt; alone" in row[0]


def test_scores_stand_beside_interval_blind_and_chance():
    row = re.search(r"<tr><td>image_answer.*?</tr>", page())
    assert row is not None
    assert re.findall(r"[\d.]+%", row[0]) == ["87.5%", "80.0%", "93.0%", "25.0%", "20.0%"]


def test_a_score_that_one_model_lacks_leaves_its_cells_empty():
    html = page(scores={"ours": {"a": SCORE}, "theirs": {"b": SCORE}})
    assert html.count("<td></td><td></td>") == 2


def test_a_wrong_saying_shows_the_truth_and_a_right_one_does_not():
    clip = np.zeros((1, 4, 4, 3), np.uint8)
    right, wrong = Saying("", "a one", "a one"), Saying("which digit", "two", "three")
    html = page(exhibits=[Exhibit(clip, {"ours": [right, wrong]})])
    assert "(three)" in html and "(a one)" not in html
    assert not Exhibit(clip, {"ours": [right, wrong]}).right and Exhibit(clip, {"ours": [right]}).right


def test_a_film_strip_holds_every_frame_unchanged():
    clip = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    html = page(exhibits=[Exhibit(clip, {})])
    found = re.search(r"base64,([^\"]+)", html)
    assert found is not None
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))
    assert strip.shape == (4, 3 * 5 + 2 * 2, 3)
    for index, frame in enumerate(clip):
        np.testing.assert_array_equal(strip[:, index * 7 : index * 7 + 5], frame)


def test_a_curve_that_falls_is_drawn_falling():
    html = page(curves={"caption": [(0, 4.0), (10, 1.0), (20, 0.5)]})
    line = re.search(r'points="([^"]+)"', html)
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)  # SVG counts downwards


def test_a_page_is_written_whole(tmp_path):
    report = Report(title="t", about=[], scores={"ours": {"a": SCORE}})
    report.write(tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text() == report.html()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_table_of_scores_is_never_cut():
    score = Score(metric="accuracy", value=0.94, low=0.91, high=0.96, blind=0.1, chance=0.1, n=300)
    results = Results(recipe="any", tasks={"an_evaluation_of_a_long_name/and_a_type": score}, facts={})
    file = io.StringIO()
    screen = Console(width=40, file=file)
    results.show(screen)
    said = file.getvalue()
    assert "an_evaluation_of_a_long_name/and_a_type" in said and "91.0% to 96.0%" in said
    assert "…" not in said and screen.width == 40


def test_whatever_is_said_on_a_page_is_only_text():
    said = "<script>alert(1)</script>\x1b]0;t\x07\u202e\"'&"
    score = {said: SCORE | {"metric": said}}
    clip = np.zeros((1, 4, 4, 3), np.uint8)
    exhibits = [Exhibit(clip, {said: [Saying(said, said, "truth")]})]
    html = page(title=said, about=[said], scores={said: score}, exhibits=exhibits, curves={said: [(1, 2.0)]})
    assert "<script" not in html and html.count("&lt;script&gt;") >= 7
    assert all(letter.isprintable() or letter == "\n" for letter in html)
