import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
from PIL import Image

from pipelines.plots import Curve, Point, curves_svg, smooth, spectrogram_png, variants_svg


def test_smooth():
    values = np.array([1.0, 3.0, np.nan, 5.0])
    assert smooth(values, 2).tolist() == [1.0, 2.0, 3.0, 5.0]
    assert smooth(values, 1)[[0, 1, 3]].tolist() == [1.0, 3.0, 5.0] and np.isnan(smooth(values, 1)[2])
    assert smooth(values, 9).tolist() == [1.0, 2.0, 2.0, 3.0]


def test_a_chart_is_one_svg_element_in_the_colours_of_the_page():
    curve = Curve(name="loss", train=[(step, 1 / step) for step in range(1, 200)], validation=[(100, 0.1), (199, 0.05)])
    svg = curves_svg(curve, "chart-0")
    # Namespaces go: the HTML parser knows them, and the page then names no address at all.
    assert ElementTree.fromstring(re.sub("xlink:", "", svg)).tag == "svg"
    assert "var(--accent)" in svg and "var(--second)" in svg and "training" in svg and "://" not in svg
    assert not re.search(r"#0[1-4]0", svg)


def test_ids_of_charts_stay_apart_and_references_resolve():
    curve = Curve(name="loss", train=[(1, 2.0), (2, 1.0)])
    ids = [re.findall(r'\bid="([^"]+)"', curves_svg(curve, prefix)) for prefix in ("a", "b")]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', curves_svg(curve, "a"))) <= set(ids[0])


def test_curves_without_a_finite_point():
    assert curves_svg(Curve(name="loss", train=[(1, float("nan"))]), "a").startswith("<svg")


def test_spectrogram_has_low_bands_at_the_bottom_and_clips_to_its_scale():
    mel = np.full((4, 6), -9.0)
    mel[0] = 7.0
    picture = np.asarray(Image.open(io.BytesIO(spectrogram_png(mel, low=-5.0, high=0.0))).convert("L"), dtype=int)
    assert picture.shape == (4, 6)
    assert (picture[-1] > 200).all() and (picture[:-1] < 20).all()


def test_variants_are_told_apart_by_line_and_colour():
    rising = [Point(n, 0.1 * n, 0.01) for n in range(3)]
    svg = variants_svg({"base": rising, "dpo": rising[:2], "full": [Point(0, 0.1)]}, "v")
    root = ElementTree.fromstring(re.sub("xlink:", "", svg))
    assert {"base", "dpo", "full", "round"} <= {text.text for text in root.iter("text")}
    curves = [path.get("style") for path in root.iter("path") if "stroke-width: 1.6" in path.get("style", "")]
    coloured = [next(name for name in ("accent", "second", "good") if f"var(--{name})" in style) for style in curves]
    assert coloured[:3] == ["accent", "second", "good"]
    assert ["stroke-dasharray" in style for style in curves[:3]] == [False, True, True]


def test_colour_and_dashes_together_are_met_once():
    svg = variants_svg({f"v{number}": [Point(0, 0.1), Point(1, 0.2)] for number in range(13)}, "v")
    styles = [path.get("style") for path in ElementTree.fromstring(re.sub("xlink:", "", svg)).iter("path")]
    curves = [style for style in styles if "stroke-width: 1.6" in style]
    assert len(set(curves)) == 13
    dashes = [re.search("stroke-dasharray: ([^;]*);", style)[1] for style in curves[1:13]]
    assert [dashes.count(each) for each in dashes] == [3] * 12


def test_a_variant_without_a_name_needs_no_legend_and_rounds_are_whole():
    points = [Point(0, 1.0, 0.1), Point(1, float("nan"))]
    words = [re.findall(r"<text[^>]*>([^<]*)</text>", variants_svg({name: points}, "v")) for name in ("", "base, 3 seeds")]
    assert words[0][:3] == ["0", "1", "round"] and words[1] == [*words[0], "base, 3 seeds"]
    assert variants_svg({"base": []}, "v").startswith("<svg")


def test_a_variant_without_points_keeps_its_colour_and_has_no_place_in_the_legend():
    svg = variants_svg({"base": [], "dpo": [Point(0, 0.1), Point(1, 0.2)]}, "v")
    assert "dpo" in svg and "base" not in svg
    curves = [path.get("style") for path in ElementTree.fromstring(re.sub("xlink:", "", svg)).iter("path")]
    assert all("var(--second)" in style for style in curves if "stroke-width: 1.6" in style)
