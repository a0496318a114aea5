"""Install the project and some of its extras: `python tools/install.py EXTRAS`.

uv installs what `make test` needs in a quarter of pip's time. It does not read
pip's settings, so they become its arguments. Where uv fails, pip installs.
"""

import ast
import os
import subprocess
import sys

# pip's settings that say where packages come from, and uv's options.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
}


def options_of(settings):
    """Return uv's options for pip's settings.

    Args:
        settings: str, output of `pip config list`.

    Returns:
        list of str, and the path of certificates or `None`.

    Example:
        >>> options_of("global.index-url='https://example.org/simple'")
        (['--default-index', 'https://example.org/simple'], None)
    """
    options, certificates = [], None
    for line in settings.splitlines():
        name, _, value = line.partition("=")
        key, value = name.rpartition(".")[2], ast.literal_eval(value)
        if key == "cert":
            certificates = value
        if key in OPTIONS:
            for part in value.split():
                options += [OPTIONS[key], part]
    return options, certificates


def main():
    """Install, in the environment of this Python."""
    wanted = ["-c", "constraints.txt", "-e", f".[{sys.argv[1]}]"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # Compiling what is installed takes half of the time; a module is compiled
    # when it is first imported.
    install = [*pip, "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "-c", "constraints.txt", "uv"], check=True)
    listed = subprocess.run([*pip, "config", "list"], stdout=subprocess.PIPE)
    options, certificates = options_of(listed.stdout.decode())
    # pip takes the best version of all indexes, uv that of the first index.
    options += ["--index-strategy", "unsafe-best-match"]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet"]
    found = subprocess.run(
        [*uv, "--python", sys.executable, *options, *wanted],
        env=os.environ
        | ({"SSL_CERT_FILE": certificates} if certificates else {}),
    )
    if found.returncode:
        print("uv failed; pip installs.", file=sys.stderr)
        subprocess.run([*install, *wanted], check=True)


if __name__ == "__main__":
    main()
