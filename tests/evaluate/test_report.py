"""The report: its JSON shape, that hostile text comes out harmless, that it is one file, and the same every time."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from kd_core.evaluate import charts
from kd_core.evaluate.certainty import Certainty
from kd_core.evaluate.charts import Curve
from kd_core.evaluate.gate import Verdict
from kd_core.evaluate.report import render_html, render_markdown, report_json
from kd_core.evaluate.report_data import ModelRow, ReportData, Sample, SampleAnswer, StageRow
from kd_core.evaluate.statistics import Comparison, Estimate
from kd_core.summaries import RuleResult

DASH = "\N{EN DASH}"
HOSTILE = "<script>alert('x')</script>"


def around(value, half=0.02, n=500):
    return Estimate(value, value - half, value + half, n, 0, 3)


def curve(model, seed, part, level):
    steps = tuple(range(0, 400, 4))
    return Curve(model, seed, part, steps, tuple(level + 2.2 * math.exp(-s / 60) + 0.03 * math.sin(s * (seed + 2)) for s in steps))


def example():
    """Made-up data with every section filled."""
    metrics = {
        "teacher": {"pass_at_1": around(0.912), "nll": around(0.101, 0.004), "truncated": Estimate(0.0, 0.0, 0.0076, 480, 20, 1)},
        "student": {"pass_at_1": around(0.804), "nll": around(0.162, 0.006), "kl": around(0.041, 0.003), "agreement": around(0.948, 0.004)},
        "baseline": {
            "pass_at_1": around(0.671, 0.03),
            "nll": around(0.231, 0.009),
            "kl": around(0.112, 0.008),
            "agreement": around(0.9, 0.01),
        },
        "ablation_hard": {"pass_at_1": around(0.786, 0.025), "nll": around(0.177, 0.006), "kl": around(0.06, 0.004)},
    }
    further = {"teacher": 0.71, "student": 0.482, "baseline": 0.31, "ablation_hard": 0.455}
    sizes = {
        "teacher": (6_331_392, 2_410.0),
        "student": (812_032, 9_215.0),
        "baseline": (812_032, 9_180.0),
        "ablation_hard": (812_032, None),
    }
    models = tuple(
        ModelRow(name, params, 4 * params, speed, {**metrics[name], "longer-sums/pass_at_1": around(further[name])})
        for name, (params, speed) in sizes.items()
    )
    verdict = Verdict(
        False,
        (
            RuleResult("pass_at_1 better than baseline", True, "improvement +0.1330 [+0.1010, +0.1650]; required: low end above +0"),
            RuleResult("kl not worse than the champion by more than 0.01", True, "there is no champion yet"),
            RuleResult("parameter_ratio at most 0.1", False, "0.1283 (812,032 of 6,331,392); required: at most 0.1"),
        ),
    )
    comparisons = (
        Comparison("pass_at_1", "student", "baseline", 0.133, 0.101, 0.165, 500, 0, (3, 3)),
        Comparison("pass_at_1", "student", "ablation_hard", 0.018, -0.006, 0.042, 500, 0, (3, 3)),
        Comparison("pass_at_1", "student", "teacher", -0.108, -0.131, -0.085, 500, 0, (3, 1)),
        Comparison("kl", "student", "baseline", -0.071, -0.078, -0.064, 500, 0, (3, 3)),
        Comparison("kl", "student", "ablation_hard", -0.019, -0.023, -0.015, 500, 0, (3, 3)),
        Comparison("longer-sums/pass_at_1", "student", "baseline", 0.172, 0.13, 0.214, 500, 0, (3, 3)),
    )
    curves = tuple(
        curve(model, seed, part, level + offset)
        for part, offset in (("train loss", 0.1), ("validation nll", 0.15))
        for model, level in (("student", 0.1), ("baseline", 0.2), ("ablation_hard", 0.14))
        for seed in (0, 1, 2)
    ) + tuple(curve("student", seed, part, 0.05) for part in ("hard part", "soft part") for seed in (0, 1, 2))
    samples = (
        Sample(
            "a1",
            "7+5-9+6=",
            "9",
            (
                SampleAnswer("teacher", "7+5=12,12-9=3,3+6=9#9", True),
                SampleAnswer("student", "7+5=12,12-9=3,3+6=9#9", True),
                SampleAnswer("baseline", "7+5=12,12-9=3,3+6=8#8", False),
            ),
        ),
        Sample(
            "b2", "8-3+4-2=", None, (SampleAnswer("teacher", "8-3=5,5+4=9,9-2=7#7", None), SampleAnswer("student", "8-3=5," * 100, None))
        ),
    )
    return ReportData(
        recipe_name="running-sums",
        description="A small model learns to add and subtract in steps from a teacher eight times its size.",
        suites=("test", "longer-sums"),
        confidence=0.95,
        seeds=(0, 1, 2),
        published_seed=1,
        verdict=verdict,
        champion=None,
        models=models,
        comparisons=comparisons,
        stages=(
            StageRow("prompts", "3f" * 16, "reused", 0.4),
            StageRow("teacher", "9a" * 16, "reused", 312.0),
            StageRow("answers", "c1" * 16, "computed", 95.5),
            StageRow("student", "07" * 16, "computed", 4210.0),
        ),
        counts={
            "Prompts": {"read": 12_000, "left out: the same prompt twice": 340, "left out: overlap with a suite": 12, "train": 9_900},
            "Teacher's answers": {"answered": 19_800, "kept": 17_204, "rejected: wrong": 2_310, "rejected: truncated": 286},
        },
        curves=curves,
        samples=samples,
        command="kd run recipes/running-sums.yaml",
        recipe_yaml="name: running-sums\nseeds: [0, 1, 2]\n",
        versions={"knowledge-distillery": "0.1.0", "torch": "2.13.0", "machine": "x86_64, 2 cores"},
        price_per_hour=0.85,
        certainty=Certainty(0.0123, 104_220, 0.971, 12_800),
    )


@pytest.fixture(scope="module")
def page():
    return render_html(example())


def test_json_shape():
    found = report_json(example())
    assert list(found)[:5] == ["finding", "verdict", "models", "comparisons", "stages"]
    assert set(found["finding"]) == {"asked", "found", "decided", "title", "claim", "text"}
    assert found["finding"]["decided"] == found["verdict"]["headline"]
    assert found["certainty"]["mean_entropy"] == 0.0123
    assert (found["class_samples"], found["confusions"], found["samples_scored"]) == ([], [], True)
    assert set(found["verdict"]) == {"promote", "headline", "reasons", "champion"}
    assert found["verdict"]["reasons"][2] == {
        "rule": "parameter_ratio at most 0.1",
        "holds": False,
        "detail": "0.1283 (812,032 of 6,331,392); required: at most 0.1",
    }
    assert list(found["models"]) == ["teacher", "student", "baseline", "ablation_hard"]
    for model in found["models"].values():
        assert set(model) == {"params", "bytes", "tokens_per_second", "metrics"}
        for metric in model["metrics"].values():
            assert set(metric) == {"value", "low", "high", "n", "left_out", "num_seeds", "scope"}
    assert set(found["comparisons"][0]) == {"metric", "a", "b", "difference", "low", "high", "n", "left_out", "num_seeds", "scope"}
    assert (found["suite"], found["suites"], found["published_seed"]) == ("test", ["test", "longer-sums"], 1)
    assert set(found["stages"][0]) == {"name", "fingerprint", "status", "seconds"}
    assert found["speed_up"] == pytest.approx(9_215 / 2_410)
    assert found["memory_ratio"] == pytest.approx(812_032 / 6_331_392)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


class Elements(HTMLParser):
    """What a browser would see: elements in order, attributes that load something, and that every element is closed."""

    VOID = ("meta", "img", "use", "path", "rect")

    def __init__(self):
        super().__init__()
        self.names, self.loads, self.open, self.ids, self.references = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset") and not value.startswith("#")
        ]
        self.references += [value[1:] for name, value in attrs if name == "href" and value.startswith("#")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(page):
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    return elements


def test_the_page_is_one_well_formed_file_that_loads_nothing(page):
    elements = parsed(page)
    assert elements.names.count("svg") == 6
    assert elements.loads == []
    assert not {"script", "link", "img", "iframe", "object", "metadata"} & set(elements.names)
    assert "://" not in page
    assert "@import" not in page
    assert len(elements.ids) == len(set(elements.ids)), "ids of different charts clash"
    assert len(elements.references) > 10
    assert set(elements.references) <= set(elements.ids)
    assert len(page) < 400_000


def test_the_verdict_comes_first_with_every_rule(page):
    assert "✗ The student is not promoted" in page
    assert page.index("not promoted</strong>") < page.index("there is no champion yet") < page.index("<h2>Models")
    assert '<section class="verdict no">' in page
    promoted = render_html(
        replace(example(), curves=(), verdict=Verdict(True, example().verdict.reasons[:2]), champion="digest-of-champion")
    )
    assert "✓ The student is promoted" in promoted
    assert '<section class="verdict yes">' in promoted
    assert "digest-of-champion" in promoted


def promoted_with(difference, low, high):
    """The example promoted, with this paired difference of pass@1 between soft and hard labels."""
    others = tuple(pair for pair in example().comparisons if (pair.metric, pair.b) != ("pass_at_1", "ablation_hard"))
    pair = Comparison("pass_at_1", "student", "ablation_hard", difference, low, high, 500, 0, (3, 3))
    return replace(example(), verdict=Verdict(True, example().verdict.reasons[:2]), comparisons=(pair, *others), curves=())


def test_a_promotion_is_not_green_where_soft_labels_lost():
    data = promoted_with(-0.086, -0.12, -0.05)
    for text in (render_html(data), render_markdown(data)):
        top = text[: text.index("there is no champion yet")]
        assert "Promoted by its rules, but soft labels lost to hard ones" in top
        assert "soft labels are worse than hard ones by 0.086" in top
        assert "✓ The student is promoted" not in text
    assert '<section class="verdict doubt">' in render_html(data)
    assert '<section class="verdict yes">' in render_html(promoted_with(-0.086, -0.18, 0.01))


def test_the_finding_is_the_first_thing_said(page):
    said = (
        "Asked whether a student an eighth of the teacher's size can do the teacher's work on test: it reaches 0.804 [0.784, 0.824] of "
        "answers right; "
    )
    assert said in page.replace("&#39;", "'")
    assert page.index("Asked whether") < page.index("<h2>")
    assert render_markdown(example()).index("Asked whether") < 120
    assert report_json(example())["finding"]["text"].startswith(said)


def test_the_teachers_certainty_stands_beside_soft_against_hard(page):
    words = "the teacher's mean entropy is 0.012 nats; at 97.1% of 12,800 of them its likeliest token has a probability above 0.99."
    meaning = "A teacher that is always sure has nothing more to say than its words"
    differences = page[page.index("What the differences are worth") : page.index("<h2>Training")].replace("&#39;", "'")
    assert words in differences
    assert meaning in differences
    text = render_markdown(example()).replace("&#39;", "'")
    assert text.index("## Paired differences") < text.index(words) < text.index("## Prompts")
    assert "mean entropy" not in render_html(replace(example(), certainty=None))
    unsure = render_markdown(replace(example(), certainty=Certainty(0.8, 10, 0.4, 10)))
    assert meaning not in unsure
    assert "Where a teacher hesitates" in unsure


def test_answers_made_for_the_page_alone_say_so(page):
    assert "no score rests on them" not in page
    for text in (render_html(replace(example(), samples_scored=False)), render_markdown(replace(example(), samples_scored=False))):
        assert "no score rests on them" in text


def test_numbers_are_where_they_belong(page):
    row = re.search(r"KL to teacher<small>.*?</tr>", page, re.DOTALL).group()
    cells = re.findall(r"<td class=\"(\w+)\">(.*?)</td>", row, re.DOTALL)
    assert [(name, re.sub(r"<[^>]+>", " ", cell).split()) for name, cell in cells] == [
        ("teacher", [DASH]),
        ("student", ["0.041", "0.038", DASH, "0.044"]),
        ("baseline", ["0.112", "0.104", DASH, "0.120"]),
        ("ablation_hard", ["0.060", "0.056", DASH, "0.064"]),
    ]
    assert "7.8\N{MULTIPLICATION SIGN}</dt><dd>fewer parameters than the teacher" in page
    assert "+0.133</dt><dd>better than the baseline [+0.101, +0.165]" in page
    assert "1 h 10 min" in page  # 4,210 s
    assert f"{4210 / 3600 * 0.85:.4f}" in page


def test_every_suite_is_shown_and_items_without_a_value_are_counted(page):
    assert "0.804</dt><dd>pass@1 of the student on test" in page
    assert "0.482</dt><dd>pass@1 of the student on longer-sums" in page
    assert "<small>480 of 500 items</small>" in page
    text = render_markdown(example())
    assert "0.000 [0.000, 0.008] on 480 of 500 items |" in text
    assert "Suites test, longer-sums; metrics without a prefix are of the first." in text


def test_one_seed_is_said_to_be_about_checkpoints(page):
    alone = replace(example(), seeds=(0,))
    for text in (render_html(alone), render_markdown(alone)):
        assert "Intervals are about these checkpoints on new items. There is one training seed" in text
    assert "from 3 seeds each" in page
    assert "The student of seed 1, which has the least validation loss, is the one that would be published" in page


def hostile():
    base = example()
    sample = Sample(HOSTILE, HOSTILE, HOSTILE, (SampleAnswer("student", HOSTILE + '"><img src=x onerror=y>', False),))
    return replace(
        base,
        recipe_name=HOSTILE,
        description=HOSTILE,
        samples=(sample,),
        recipe_yaml=f"name: </pre></details>{HOSTILE}\n# ````\n",
        command=HOSTILE,
        counts={HOSTILE: {HOSTILE: 1}},
        verdict=Verdict(False, (RuleResult(HOSTILE, False, HOSTILE),)),
        stages=(StageRow(HOSTILE, HOSTILE, HOSTILE, 1.0),),
        versions={HOSTILE: HOSTILE},
        curves=(replace(base.curves[0], part=HOSTILE),),
        models=(*base.models, replace(base.models[0], name=HOSTILE)),
    )


def test_hostile_text_is_shown_not_run(page):
    bad = render_html(hostile())
    elements = parsed(bad)
    assert not {"script", "img"} & set(elements.names)
    assert elements.names.count("details") == parsed(page).names.count("details") == 1
    assert "&lt;script&gt;" in bad
    assert "&lt;/details&gt;" in bad


def test_hostile_text_in_markdown():
    text = render_markdown(hostile())
    outside_fences = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside_fences
    assert "&lt;script&gt;" in outside_fences
    assert "`````yaml" in text  # longer than the four backticks inside
    piped = replace(example(), recipe_name="a|b [link](x) *bold*\n# heading")
    assert render_markdown(piped).startswith("# a\\|b \\[link\\](x) \\*bold\\* \\# heading\n")


def test_markdown_tables_are_whole():
    text = render_markdown(example())
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 6  # rules, models, differences, two of counts, stages
    for block in blocks:
        assert len({re.sub(r"\\\|", "", line).count("|") for line in block.splitlines()}) == 1, block
    assert (
        "| Student \N{MINUS SIGN} Hard labels only | +0.0180 | [-0.0060, +0.0420] | 500 | not told apart | these recipes (3 and 3 seeds)"
        in text
    )


def test_long_texts_are_cut_with_the_rest_in_the_title(page):
    whole = "8-3=5," * 100
    assert f'title="{whole}"' in page
    assert f">{whole[:420]} …<" in page
    assert f">{whole}<" not in page


def test_sections_without_data_are_left_out():
    bare = replace(
        example(),
        comparisons=(),
        curves=(),
        counts={"Prompts": {}},
        samples=(),
        price_per_hour=None,
        models=example().models[1:2],
        certainty=None,
    )
    page = render_html(bare)
    assert "svg" not in parsed(page).names
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Models", "Prompts and answers", "Time", "How to reproduce"]
    assert "Prompts and answers" not in render_html(replace(bare, counts={}))
    assert report_json(bare)["speed_up"] is None


def test_the_same_data_gives_the_same_page(page):
    """Dates and salted hashes would make it another page in another process."""
    code = "import sys, test_report; sys.stdout.buffer.write(test_report.render_html(test_report.example()).encode())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=__file__.rsplit("/", 1)[0])
    assert run.stdout.decode() == page


def test_charts_use_the_colours_of_the_page(page):
    assert not re.search(r"#0a0[bc]0\d", page)
    assert {"currentColor", "var(--student)", "var(--good)", "var(--bad)"} <= set(re.findall(r"currentColor|var\(--[a-z]+\)", page))


def test_matplotlib_is_imported_by_the_first_chart_only():
    code = "import sys, kd_core.evaluate.report; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_curves_are_averaged_not_thinned():
    steps, values = charts._averaged(Curve("student", 0, "loss", tuple(range(1, 241)), tuple(float(i % 3) for i in range(240))))
    assert (len(steps), steps[:2], set(values)) == (80, [2.0, 5.0], {1.0})
