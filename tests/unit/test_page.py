"""Building blocks of result pages, and the attention maps they show."""

import base64
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.report.attention_maps import merge_pieces
from evaluation.report.chart import (
    COLOURS,
    HEIGHT,
    KEY_MARK,
    LETTER,
    WIDTH,
    lay_out,
    nice_ticks,
)
from evaluation.report.examples import answer_case, box_case
from evaluation.report.images import heat_map, image_uri
from evaluation.report.page import (
    bar,
    card,
    figure,
    line_chart,
    page,
    recall_table,
    score_table,
    table,
    thumbnail,
)
from evaluation.report.recognition import label_case
from models.fusion.grounding import token_maps
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig

ROOT = Path(__file__).resolve().parents[2]


def test_text_never_becomes_markup():
    hostile = "<script>alert('x')</script>&"
    made = page(
        hostile, [card(hostile, table([hostile], [[hostile]]), intro=hostile)], hostile, hostile
    )
    assert "<script" not in made and made.count("&lt;script&gt;") == 8


def test_captions_labels_and_names_are_escaped_as_written():
    hostile = "<b>&'\""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    made = [
        answer_case([], hostile, [(hostile, 0.5)], hostile, True),
        label_case(image, [(hostile, 0.5)], [hostile], True),
        box_case(image, torch.rand(8, 8), hostile, [(0, 0, 4, 4)], 0, (0, 0, 4, 4), 1.0),
        line_chart({hostile: [(0, 1)], "other": [(1, 2)]}, hostile, hostile, (hostile, 1.0)),
        figure(thumbnail(image), hostile),
    ]
    for block, count in zip(made, (3, 3, 1, 6, 1), strict=True):
        assert "<b>&" not in block and block.count("&lt;b&gt;&amp;&#39;&#34;") == count


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.34), (-3, 1200), (5, 5), (0, 0), (1e-6, 3e-5)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks == sorted(set(ticks)) and 1 <= len(ticks) <= 8
    step = (high - low) / 4 or abs(high) or 1
    assert ticks[0] <= low + 2.5 * step and ticks[-1] >= high - 2.5 * step


def test_chart_keeps_its_points_inside():
    made = line_chart(
        {"a": [(0, 1.0), (5, 3.0), (10, -2.0)], "b": [(0, 0.5)]}, "t", guide=("chance", 0.3)
    )
    lines = []
    for line in re.findall(r'points="([^"]*)"', made):
        lines.append([[float(n) for n in point.split(",")] for point in line.split()])
    assert all(0 <= x <= 340 and 0 <= y <= 190 for line in lines for x, y in line)
    (_, first), (_, highest), (_, lowest) = lines[0]
    assert highest < first < lowest  # SVG counts from the top
    assert made.count("<polyline") == 2 and "chance" in made
    assert made.count('r="3"') == 1, "one point is no line"
    assert line_chart({"a": []}) == ""


def test_names_of_many_lines_stand_apart_below_the_chart():
    """Of runs: each has its colour and dash in every chart, also where another has no point."""
    runs = {f"run {n}": [] if n == 3 else [(0, n), (1, 2)] for n in range(21)}
    chart = lay_out(runs, "loss", "step", None)
    assert [line.name for line in chart.lines] == [name for name in runs if name != "run 3"]
    looks = [(line.colour, line.dash) for line in chart.lines]
    assert len(set(looks)) == 20 and looks[4] == (COLOURS[5], "none")
    end = {line.key: line.key[0] + KEY_MARK + LETTER * len(line.name) for line in chart.lines}
    assert all(HEIGHT - 5 <= y <= chart.height - 5 for _, y in end)
    for (x, y), right in end.items():
        assert right <= min([WIDTH, *(left for left, row in end if row == y and left > x)])
    assert 'stroke-dasharray="5 3"' in line_chart(runs)


def test_recalls_become_a_row_each_under_their_titles():
    names = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
    recall = {name: 10.0 + number for number, name in enumerate(names)}
    made = recall_table({"ours": recall, "chance": recall})
    assert re.findall(r"<th[^>]*>([^<]*)<", made) == [
        "recall in %",
        *(f"caption R@{k}" for k in (1, 5, 10)),
        *(f"image R@{k}" for k in (1, 5, 10)),
        "mean",
    ]
    figures = [f"{value:.1f}" for value in recall.values()]
    assert re.findall(r"<td[^>]*>([^<]*)<", made) == ["ours", *figures, "chance", *figures]
    assert made.count('class="text"') == 2 and made.count('class="best text"') == 1  # names


def test_a_table_is_flush_left_in_its_first_column_and_nothing_is_bold_unasked():
    made = table(["name", "score"], [["a", "1"], ["b", "2"]])
    assert made.count('<th class="text">') == 1 and made.count('<td class="text">') == 2
    assert "best" not in made and "<b " not in bar(50.0)


def test_thumbnail_is_a_jpeg_inside_the_page():
    import base64

    from PIL import Image

    image = torch.zeros(3, 10, 14, dtype=torch.uint8)
    image[0] = 200
    data = re.search(r"base64,([^\"]*)", thumbnail(image, 20, right=True))[1]
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert decoded.size == (40, 40) and decoded.getpixel((20, 20))[0] > 190


def test_heat_map_is_warm_where_it_is_high():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    painted = heat_map(torch.zeros(3, 8, 8, dtype=torch.uint8), heat, 32).int()
    assert painted[0, 2, 2] > painted[0, 28, 28] + 80


@pytest.mark.parametrize("single_stream", [True, False])
def test_word_maps_are_the_gradient_weighted_attention(single_stream):
    torch.manual_seed(0)
    bert = BertConfig(30, 16, 3, 2, 32, 20, encoder_width=16, single_stream=single_stream)
    bert.fusion_layer = 0 if single_stream else 1
    model = Retrieval(
        RetrievalConfig(ViTConfig(32, 8, 16, 1, 2), bert, embed_dim=8, queue_size=4)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids, mask = torch.randint(5, 30, (1, 6)), torch.ones(1, 6, dtype=torch.bool)
    image = torch.randn(1, 3, 32, 32)
    for layer in (1, 2):
        maps = token_maps(model, image, ids, mask, layer)[0]
        assert maps.shape == (6, 4, 4) and (maps >= 0).all() and maps.max() > 0
    # in the last layer only [CLS] reaches the score, so no other word has a gradient
    assert (maps[1:] == 0).all() and token_maps(model, image, ids, mask, 1)[0, 1:].max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pieces_of_a_word_are_averaged_and_scaled():
    pieces = ["[CLS]", "play", "##ing", "cat"]
    maps = torch.stack([torch.full((2, 2), v) for v in (9.0, 1.0, 3.0, 0.0)])
    maps[1, 0, 0] = 5
    merged = merge_pieces([0, 1, 2, 3], maps, lambda number: pieces[number])
    assert [word for word, _ in merged] == ["playing", "cat"]
    assert merged[0][1].tolist() == [[1.0, 0.5], [0.5, 0.5]] and merged[1][1].max() == 0


def test_bars_are_as_long_as_the_scores_and_marked_at_chance():
    made = score_table(
        ["task", "ours", "chance"], [("<b>all</b>", 71.25, 50.0), ("some", 12.5, None)]
    )
    assert "width:71.2%" in made and "calc(50.0% - 1px)" in made and made.count('class="bar"') == 2
    assert made.count("calc(") == 1 and "&lt;b&gt;all" in made


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"  # Pillow would start Ghostscript


@pytest.mark.parametrize("content", [None, b"", b"no image", EPS, b"\xff\xd8\xff torn"])
def test_an_unreadable_image_is_grey_on_the_page(content, tmp_path):
    """The evaluation before it went on with a grey one, too: its scores must not be lost here."""
    file = tmp_path / "a.jpg"
    if content is not None:
        file.write_bytes(content)
    for source in (file, content or b""):
        uri = image_uri(source, side=8)
        shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert shown.size == (8, 8) and shown.getextrema() == ((128, 128),) * 3


def test_an_image_of_sixteen_bits_is_as_light_on_the_page_as_it_is():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(file, "PNG")
    uri = image_uri(file.getvalue(), side=8)
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert shown.getextrema() == ((100, 100),) * 3


def test_a_fifo_is_grey_on_the_page(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert image_uri(tmp_path / "a.jpg", 8) == image_uri(b"", 8)


def test_the_page_finds_an_image_where_the_evaluation_does(tmp_path):
    """In a zip file, and under a name of macOS or Windows."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(file, "PNG")
    expected = image_uri(file.getvalue(), 8)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/0.png", file.getvalue())
    (tmp_path / "caf\u00e9.png").write_bytes(file.getvalue())
    for name in ("a.zip/in/0.png", "cafe\u0301.png", ".\\a.zip\\in\\0.png"):
        assert image_uri(tmp_path / name, 8) == expected != image_uri(b"", 8)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_every_ground(mode):
    style = (ROOT / "evaluation/report/page.css").read_text()
    rules = style.partition("* {")[2]
    written = set(re.findall(r"(?<![-\w])(?:color|fill): ([^;}]+)", rules))
    texts = {"ink", "soft", "accent", "badge"}
    assert {text.strip() for text in written} == {f"var(--{name})" for name in texts}
    colours = dict(re.findall(r"--(\w+): (#\w{6})", re.findall(r":root \{([^}]*)\}", style)[mode]))
    grounds = {"badge": ("right", "wrong")}
    for text in texts:
        for ground in grounds.get(text, ("page", "card", "fill")):
            dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
            contrast = (light + 0.05) / (dark + 0.05)
            assert contrast >= 4.5, f"--{text} on --{ground}: {contrast:.2f}"
