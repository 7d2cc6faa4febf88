"""Pictures, class bars and confusions: what is drawn is what was given, hostile names are harmless, and the page holds it all."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kd_core.errors import KDError
from kd_core.evaluate.class_charts import class_bars, confused_pairs, confusion_matrix, picture
from kd_core.evaluate.report import render_html, render_markdown, report_json
from kd_core.evaluate.report_data import ClassGuess, ClassSample, Confusion
from tests.evaluate.test_report import HOSTILE, example, parsed


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


THREE = png([[0, 200, 200, 0], [0, 0, 0, 200], [0, 0, 200, 0], [0, 0, 0, 200], [0, 200, 200, 0]])
GUESSES = (
    ClassGuess("teacher", (("3", 0.85), ("8", 0.10), ("5", 0.047), ("9", 0.003))),
    ClassGuess("student", (("3", 0.61), ("8", 0.21), ("5", 0.11))),
    ClassGuess("ablation_hard", (("8", 0.9996), ("5", 0.0003), ("3", 0.0001))),
)


def samples(number=2):
    return tuple(ClassSample(f"i{i}", THREE, None, "3", "no row of this class was learnt from", GUESSES) for i in range(number))


def text_sample(text="My card has not arrived"):
    return ClassSample("t", None, text, "card_arrival", None, (ClassGuess("teacher", (("card_arrival", 0.7), ("lost_card", 0.2))),))


def confusion(num_classes, model="student"):
    counts = tuple(tuple(50 if i == j else (i + 2 * j) % 5 for j in range(num_classes)) for i in range(num_classes))
    return Confusion(model, tuple(f"class {i}" for i in range(num_classes)), counts)


# ------------------------------------------------------------------------------------------- drawings


def test_bars_are_as_long_as_their_probabilities_and_the_true_class_is_marked():
    svg = class_bars(GUESSES, "3")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert len(widths) == 9
    assert widths[:2] == pytest.approx([150 * 0.85, 150 * 0.10], abs=0.1)
    assert svg.count("<circle") == 3
    assert re.findall(r">([&\w;]*%)<", svg) == ["85%", "10%", "5%", "61%", "21%", "11%", "&gt;99%", "&lt;1%", "&lt;1%"]
    assert [svg.index(name) for name in ("Teacher<", "Student<", "Hard labels only<")] == sorted(
        svg.index(name) for name in ("Teacher<", "Student<", "Hard labels only<")
    )
    assert set(re.findall(r"var\(--[a-z]+\)", svg)) == {
        *("var(--teacher)", "var(--student)", "var(--ablation)", "var(--muted)", "var(--good)")
    }


def test_at_most_three_models_and_three_classes_are_drawn_and_the_true_one():
    many = tuple(ClassGuess(f"m{i}", tuple((f"c{j}", 0.1) for j in range(9))) for i in range(5))
    for true_class, bars in (("c1", 9), ("c7", 12), ("elsewhere", 9)):
        svg = class_bars(many, true_class)
        assert svg.count("<rect") == bars
        assert svg.count("<circle") == (0 if true_class == "elsewhere" else 3)
        assert "m3" not in svg


@given(st.lists(st.tuples(st.text(max_size=40), st.floats(0, 1)), max_size=5), st.text(max_size=20))
def test_any_names_make_a_well_formed_drawing(probabilities, true_class):
    svg = class_bars((ClassGuess(HOSTILE, tuple(probabilities)),), true_class)
    elements = parsed(svg)
    assert set(elements.names) <= {"svg", "text", "rect", "circle", "title"}


def test_a_small_picture_is_scaled_up_with_sharp_pixels_and_holds_its_bytes():
    shown = picture(THREE, 'a "3"')
    assert re.search(r'width="(\d+)" height="(\d+)"', shown).groups() == ("76", "95")
    assert 'class="sharp"' in shown
    assert base64.b64decode(re.search(r"base64,([^\"]+)", shown).group(1)) == THREE
    assert 'alt="a &quot;3&quot;"' in shown
    large = picture(png(np.zeros((120, 200))), "x")
    assert 'width="200" height="120"' in large
    assert "sharp" not in large
    with pytest.raises(KDError, match="must be a PNG"):
        picture(b"GIF89a" + bytes(30), "x")


def test_a_confusion_matrix_has_every_count():
    found = confusion(4)
    svg = confusion_matrix(found)
    numbers = [int(number) for number in re.findall(r'text-anchor="middle" fill="currentColor">(\d+)<', svg)]
    assert numbers == [count for row in found.counts for count in row if count]
    assert svg.count("<rect") == 16
    parsed(svg)


def test_the_most_confused_pairs_come_first():
    counts = ((8, 2, 0), (5, 5, 0), (1, 2, 7))
    found = confused_pairs(Confusion("student", ("a", "b", "c"), counts))
    assert [(p.true_class, p.taken_for, p.count, p.share) for p in found] == [
        *(("b", "a", 5, 0.5), ("a", "b", 2, 0.2), ("c", "b", 2, 0.2), ("c", "a", 1, 0.1))
    ]
    assert len(confused_pairs(confusion(30))) == 15


# ------------------------------------------------------------------------------------------- on the page


def test_the_page_shows_what_the_teacher_sees():
    page = render_html(replace(example(), class_samples=(*samples(14), text_sample()), confusions=(confusion(10), confusion(30))))
    elements = parsed(page)
    assert elements.names.count("img") == 12
    assert all(source.startswith("data:image/png;base64,") for source in elements.loads)
    assert "img-src data:" in page
    section = page[page.index("What the teacher sees") : page.index("What is taken for what")]
    assert section.count('<svg class="bars"') == 12
    assert "no row of this class was learnt from" in section
    assert page.count('<svg class="confusion"') == 1
    assert page.count("taken for</th>") == 1


def test_texts_stand_in_place_of_pictures():
    page = render_html(replace(example(), class_samples=(text_sample(HOSTILE),)))
    assert not {"img", "script"} & set(parsed(page).names)
    assert "<blockquote" in page


def test_markdown_and_json_hold_the_same():
    data = replace(example(), class_samples=(*samples(1), text_sample("a|b")), confusions=(confusion(3),))
    text = render_markdown(data)
    assert "  - Teacher: 3: 85%, 8: 10%, 5: 5%\n" in text
    assert "- **card\\_arrival**: a\\|b\n" in text
    assert "## Most frequent confusions: Student" in text
    found = json.loads(json.dumps(report_json(data), allow_nan=False))
    first, second = found["class_samples"]
    assert base64.b64decode(first["picture_png"]) == THREE
    assert first["models"]["teacher"][0] == ["3", 0.85]
    assert (second["picture_png"], second["text"]) == (None, "a|b")
    assert found["confusions"][0]["counts"] == [list(row) for row in confusion(3).counts]
