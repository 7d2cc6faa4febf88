"""Hook of mkdocs: the documents of the root become pages beside those of docs/, and the pages get their order.

A link means the same on a page and in the repository: in a document of the root docs/traps.md leads to the page traps.md, in one of
docs/ ../CONTRIBUTING.md to CONTRIBUTING.md. A link to a file that is no page would lead nowhere here: --strict refuses it.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_OF_ROOT = {"README.md": "index.md"} | {
    name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")
}
_ORDER = {
    "Start": "index.md",
    "The recipe, field by field": "recipe.md",
    "The library alone": "library.md",
    "Traps": "traps.md",
    "Beside peers": "benchmarks.md",
    "Architecture": "ARCHITECTURE.md",
    "Contributing": "CONTRIBUTING.md",
    "Log": "LOG.md",
    "Changelog": "CHANGELOG.md",
    "Security": "SECURITY.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages that are there."""
    there = {*_OF_ROOT.values(), *(file.name for file in Path(config.docs_dir).glob("*.md"))}
    config.nav = [{title: name} for title, name in _ORDER.items() if name in there]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root."""
    for name, page in _OF_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between root and docs/ into links between pages."""
    of_root = page.file.src_uri in _OF_ROOT.values()
    markdown = re.sub(r"(\]\()docs/" if of_root else r"(\]\()\.\./", r"\1", markdown)
    return re.sub(r"(\]\()README\.md", r"\1index.md", markdown)
