"""The installation of `make`: pip's settings become uv's options."""

from tools import install


def test_settings_of_pip_are_options_of_uv():
    settings = (
        ":env:.find-links='/wheels'\n"
        "global.extra-index-url='file:///first https://second/simple'\n"
        "global.cert='/certificates.crt'\n"
        "install.constraint='/limits.txt'\n"
        "global.timeout='60'\n"
    )
    options, certificates = install.options_of(settings)
    assert certificates == "/certificates.crt"
    assert options == [
        *("--find-links", "/wheels"),
        *("--index", "file:///first"),
        *("--index", "https://second/simple"),
        *("--constraint", "/limits.txt"),
    ]
    assert install.options_of("") == ([], None)
