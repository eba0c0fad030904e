import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
from PIL import Image

from pipelines.plots import Curve, curves_svg, smooth, spectrogram_png


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
