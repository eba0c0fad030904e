import pytest

from data_prep.remote.urls import redacted, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA123:se/cr+et=@bucket/a.mp4", "s3://***@bucket/a.mp4"),
        ("https://user:pass@host:8080/a@2x.mp4", "https://***@host:8080/a@2x.mp4"),
        ("https://token@host/a.mp4: no such file", "https://***@host/a.mp4: no such file"),
        ("403, url='https://h/a?X-Amz-Credential=AK%2Fs3&X-Amz-Expires=60&X-Amz-Signature=abc'",
         "403, url='https://h/a?X-Amz-Credential=***&X-Amz-Expires=60&X-Amz-Signature=***'"),
        ("https://h/a?AWSAccessKeyId=AK&Signature=a%3D&Expires=1", "https://h/a?AWSAccessKeyId=***&Signature=***&Expires=1"),
        ("https://h/a?sv=1&sig=abc#t=5", "https://h/a?sv=1&sig=***#t=5"),
        ("https://h/a?X-Goog-Signature=12&x-amz-security-token=t", "https://h/a?X-Goog-Signature=***&x-amz-security-token=***"),
        ("two: s3://a:b@c/d and http://e:f@g/h", "two: s3://***@c/d and http://***@g/h"),
    ],
)  # fmt: skip
def test_what_opens_a_url_is_not_shown(text, shown):
    assert redacted(text) == shown and redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a:b/c@2x.mp4", "https://www.youtube.com/watch?v=-abc_123&t=5", "http://host:8080/x:y@z.mp4", "/data/a@b:c.mp4", "a@b"],
)
def test_other_text_stays(text):
    assert redacted(text) == text == without_credentials(text)


def test_a_folder_with_credentials_is_refused_without_telling_them():
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/shards: holds credentials; take them out .* AWS_SECRET_ACCESS_KEY") as caught:
        without_credentials("s3://AKIA:hidden/key@bucket/shards")
    assert "hidden" not in str(caught.value) and "AKIA:" not in str(caught.value)
