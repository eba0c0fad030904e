import pytest

from data_prep.downloads.ytdlp import translated

YoutubeDL = pytest.importorskip("yt_dlp").YoutubeDL

# What YouTube says, as yt-dlp passes it on.
YOUTUBE = {
    "Private video. Sign in if you've been granted access to this video. Use --cookies-from-browser or --cookies": "private",
    "This video is private. If the owner of this video has granted you access, please sign in.": "private",
    "Video unavailable. This video has been removed by the uploader": "removed",
    "This video has been removed for violating YouTube's policy on hate speech": "removed",
    "Video unavailable. This video is no longer available because the YouTube account associated with it has been terminated.": "removed",
    "Video unavailable. This video is no longer available due to a copyright claim by Private Films": "removed",
    "Video unavailable. This video isn't available anymore": "removed",
    "Sign in to confirm you\u2019re not a bot. Use --cookies-from-browser or --cookies for the authentication": "blocked",
    "Video unavailable. This content isn't available, try again later. The current session has been rate-limited by YouTube": "blocked",
    "This video is unavailable. YouTube is requiring a captcha challenge before playback": "blocked",
    "Unable to download API page: HTTP Error 429: Too Many Requests": "blocked",
    "unable to download video data: HTTP Error 403: Forbidden": "blocked",
    "Sign in to confirm your age. This video may be inappropriate for some users. Use --cookies": "restricted",
    "Join this channel to get access to members-only content like this video, and other exclusive perks.": "restricted",
    "Video unavailable. This video contains content from SME, who has blocked it in your country on copyright grounds": "restricted",
    "This video is DRM protected": "restricted",
    "This video requires payment to watch: rental": "restricted",
    "Video unavailable": "unavailable",
    "Premieres in 3 hours": "unavailable",
    "Requested format is not available": "unavailable",
    "Unable to download API page: <urlopen error timed out>": "network",
    "Unable to download webpage: Failed to resolve 'www.youtube.com' ([Errno -2] Name or service not known)": "network",
    "Unable to download webpage: [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol": "network",
}


def raised_by_ytdlp(problem):
    """What leaves yt-dlp when one of its extractors raises `problem`."""
    from yt_dlp.extractor.common import InfoExtractor
    from yt_dlp.utils import YoutubeDLError

    class BrokenIE(InfoExtractor):
        IE_NAME = "youtube"
        _VALID_URL = r"https://www\.youtube\.com/watch\?v=(?P<id>[\w-]+)"

        def _real_extract(self, url):
            raise problem

    with YoutubeDL({"quiet": True, "logger": Silent()}, auto_init=False) as site:
        site.add_info_extractor(BrokenIE())
        with pytest.raises(YoutubeDLError) as caught:
            site.extract_info("https://www.youtube.com/watch?v=abcdefghijk&pp=token", download=False)
    return caught.value


class Silent:
    def debug(self, message):
        pass

    warning = error = debug


@pytest.mark.parametrize(("text", "reason"), YOUTUBE.items())
@pytest.mark.parametrize("expected", [True, False])
def test_the_words_of_youtube_become_reasons(text, reason, expected):
    from yt_dlp.utils import ExtractorError

    error = raised_by_ytdlp(ExtractorError(text, expected=expected))
    told = translated(error)
    assert told.reason == reason and str(told).startswith(text.replace("\u2019", "'")[:20])
    for noise in ("--", "ERROR", "report this issue", "\x1b", "\n", "caused by"):
        assert noise not in str(told)


def test_exceptions_with_a_meaning_of_their_own():
    from yt_dlp.cookies import CookieLoadError
    from yt_dlp.networking.exceptions import IncompleteRead
    from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, UnsupportedError, UserNotLive

    reasons = {
        "restricted": GeoRestrictedError("Only for some", countries=["DE", "FR"]),
        "not_media": UnsupportedError("https://example.org/private?token=1"),
        "unavailable": UserNotLive(),
    }
    assert {reason: translated(raised_by_ytdlp(error)).reason for reason, error in reasons.items()} == {name: name for name in reasons}
    signed = ExtractorError("Unable to open https://a:b@host.org/v.mp4?lsig=1&n=2 (caused by <HTTPError 400>)", expected=True)
    assert str(translated(raised_by_ytdlp(signed))) == "Unable to open https://***@host.org/v.mp4"
    assert translated(IncompleteRead(10, 20)).reason == "network"
    assert translated(DownloadError("\x1b[0;31mERROR:\x1b[0m \r[download] Got error: HTTP Error 503: Busy")).retry_after == 0.0
    full = translated(DownloadError("ERROR: unable to write data: [Errno 28] No space left on device"))
    assert isinstance(full, OSError) and "No space left" in str(full)  # this machine's trouble, not the video's
    assert isinstance(translated(CookieLoadError("failed to load cookies")), ValueError)
