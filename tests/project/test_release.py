"""What a release says of itself: one version, a citation, the terms of what is bundled, and pages that name tests which exist."""

import re
import sys
from pathlib import Path

import pytest

import s2sent_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def citation():
    return yaml.safe_load(text("CITATION.cff"))


def test_the_citation_is_of_this_version():
    cited = citation()
    assert cited["version"] == s2sent_kernels.__version__
    newest = re.search(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M)
    assert (newest[1], newest[2]) == (s2sent_kernels.__version__, str(cited["date-released"]))


def test_the_citation_has_what_its_format_asks_for():
    """The keys that Citation File Format 1.2.0 requires, of the software and of the paper."""
    cited = citation()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert {"message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    for author in (*cited["authors"], *paper["authors"]):
        assert author.keys() in ({"name"}, {"given-names", "family-names"}), author
    assert paper["url"] == "https://arxiv.org/abs/2508.18164" and paper["url"] in text("README.md")


@pytest.mark.skipif(tomllib is None, reason="Python 3.10 has no tomllib")
def test_the_citation_agrees_with_the_package():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    cited = citation()
    assert cited["license"] == project["license"] and cited["keywords"] == project["keywords"]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]
    assert set(project["license-files"]) == {"LICENSE", "NOTICE"}
    for name in project["license-files"]:
        assert (ROOT / name).is_file()


def test_the_notice_names_everything_that_is_bundled():
    notice = text("NOTICE")
    bundled = [path for path in (ROOT / "s2sent_kernels" / "data").iterdir() if not path.name.startswith(("__", "."))]
    assert len(bundled) >= 3
    for path in bundled:
        assert path.relative_to(ROOT).as_posix() in notice, path


def test_the_notice_agrees_with_the_model_cards():
    """SNLI, MultiNLI and counterfactual NLI, with the licences that the cards state."""
    notice = text("NOTICE")
    cards = sorted((ROOT / "s2sent_kernels" / "data").glob("*/README.md"))
    assert len(cards) >= 2
    for card in cards:
        said = " ".join(card.read_text(encoding="utf-8").split())
        (corpora,) = re.findall(r"triplets \(anchor, entailed, contradicted\) from (.*?),? from which", said)
        assert corpora == "SNLI (CC BY-SA 4.0), MultiNLI and counterfactual NLI (Apache-2.0)"
        assert re.search(r"SNLI .*CC BY-SA 4\.0", notice) and re.search(r"counterfactual NLI Apache-2\.0", notice)
        assert "license: apache-2.0" in card.read_text(encoding="utf-8")
