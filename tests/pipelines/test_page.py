from pipelines.page import Html, page, table, tag


def test_text_is_escaped_and_html_is_not():
    assert tag("p", "a < b & 'c'") == "<p>a &lt; b &amp; &#x27;c&#x27;</p>"
    assert tag("p", Html("<b>x</b>")) == "<p><b>x</b></p>"
    assert tag("p", tag("i", "<"), ">") == "<p><i>&lt;</i>&gt;</p>"


def test_attributes():
    assert tag("video", src='a"b', controls=True, muted=False, poster=None) == '<video src="a&quot;b" controls></video>'
    assert tag("meta", name="viewport", content="x") == '<meta name="viewport" content="x">'
    assert tag("div", class_="a", data_key="b") == '<div class="a" data-key="b"></div>'


def test_table():
    assert "<th>name</th>" in table(["name", "value"], [["a", "1"]], numeric=frozenset({1}))
    assert '<td class="number">1</td>' in table(["name", "value"], [["a", "1"]], numeric=frozenset({1}))
    assert "thead" not in table([], [["a", "1"]])


def test_page_title_cannot_end_early():
    assert "<title>&lt;/title&gt;</title>" in page("</title>")
