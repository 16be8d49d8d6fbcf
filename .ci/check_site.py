"""Build the documentation site, with warnings as errors, and check the pages: links, anchors, public names, docstrings that were read.

python .ci/check_site.py
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
COMMAND = ["zensical", "build", "--clean", "--strict", "--config-file", ".zensical.toml"]


class Page(HTMLParser):
    """What a page holds: ids, links, and the text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.ids, self.links, self.text, self._code = path, [], [], "", 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the id and the address of a tag."""
        given = dict(attrs)
        self._code += tag in ("code", "pre", "script")
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [value for name in ("href", "src") if tag in ("a", "img") and (value := given.get(name))]

    def handle_endtag(self, tag: str) -> None:
        """Leave code."""
        self._code -= tag in ("code", "pre", "script")

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += "" if self._code else data


def main() -> int:
    """Build and check; 1 if something is wrong, which is printed."""
    built = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=False)
    said = built.stdout + built.stderr
    if built.returncode or re.search(r"warning|griffe:", said, re.I):  # strict mode does not stop on what griffe warns of
        print(said)
        return 1
    pages = {path: Page(path) for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"}
    wrong = [*_broken_links(pages), *_wrong_names(pages), *_unread_docstrings(pages)]
    print("\n".join(wrong) or f"{len(pages)} pages; every link and anchor leads somewhere, and every public name is on its page once")
    return 1 if wrong else 0


def _broken_links(pages: dict[Path, Page]) -> Iterator[str]:
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{page.path.relative_to(SITE)}: a link to {link}, where nothing is"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{page.path.relative_to(SITE)}: a link to {link}, but that page has no such anchor"


def _wrong_names(pages: dict[Path, Page]) -> Iterator[str]:
    for package in sorted((ROOT / "fnlight").glob("*/__init__.py")):
        noun = package.parent.name
        body = ast.parse(package.read_text(encoding="utf-8")).body
        listed = [ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        ids = pages[SITE / "api" / noun / "index.html"].ids
        shown = [i.rpartition(".")[2] for i in ids if re.fullmatch(rf"fnlight\.{noun}\.\w+", i)]
        for name in {*shown, *(listed[0] if listed else shown)}:
            if shown.count(name) != 1 or (listed and name not in listed[0]):
                yield f"api/{noun}: {name} is shown {shown.count(name)} times, and __all__ of fnlight.{noun} lists it {listed[0].count(name)} times"


def _unread_docstrings(pages: dict[Path, Page]) -> Iterator[str]:
    for page in pages.values():
        for line in re.findall(r"^.*(?:>>> |^Args:).*$", page.text, re.M):
            yield f"{page.path.relative_to(SITE)}: a docstring is shown as plain text: {line.strip()[:80]!r}"


if __name__ == "__main__":
    sys.exit(main())
