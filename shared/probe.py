"""`python -m shared.probe URL`: a health check that exits with 0 if the service answers 200.

It sends TANDEM_API_KEY, which /readyz requires, and imports only the standard library because it
runs every few seconds.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 4.0


def main(url: str) -> int:
    """The exit code: 0, or 1 after writing the reason to standard error."""
    request = urllib.request.Request(url)
    if key := os.environ.get("TANDEM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    # No proxy: HTTP_PROXY is for the internet, not for the service of this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S):
            return 0
    except urllib.error.HTTPError as error:  # 503 with the service's reason in its body.
        print(f"{error.code} {error.read(500).decode(errors='replace')}", file=sys.stderr)
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
