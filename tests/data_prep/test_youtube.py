from __future__ import annotations

import pytest

from data_prep.youtube import id_in_text, id_of_address, is_video_id, youtube_url

ID = "---g-f_I2yQ"


def test_video_ids():
    assert is_video_id(ID) and id_of_address(youtube_url(ID)) == ID
    assert not any(map(is_video_id, ["", "---g-f_I2y", "---g-f_I2yQ1", "---g-f_I2y.", "---g-f_I2yQ\n", "---g-f_I2yä"]))


@pytest.mark.parametrize(
    "page", ["youtu.be/{}", "youtube.com/watch?v={}", "m.youtube.com/watch?t=3&v={}&x=1", "www.youtube.com/shorts/{}?a=b",
             "www.youtube-nocookie.com/embed/{}", "youtube.com/live/{}#t", "youtube.com/v/{}"],
)  # fmt: skip
def test_the_id_of_every_kind_of_address(page):
    address = page.format(ID)
    assert id_of_address(f"https://{address}") == id_in_text(f"see {address}") == ID
    assert id_of_address(f"https://site.org/?page={address}") is None and id_of_address(address) is None


def test_other_addresses_have_none():
    for url in ("https://youtube.com/watch?v=short", f"https://youtu.be/{ID}longer", "https://site.org/a.mp4", f"https://youtube.com/user/{ID}"):
        assert id_of_address(url) is None and id_in_text(url) is None
