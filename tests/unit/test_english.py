"""The field's words: what readers of papers, PyTorch and timm expect (image, std, resume, fix …)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = {
    r"pictures?": "image",
    r"anew": "again, from scratch",
    r"mend(s|ed|ing)?": "fix",
    r"mirror(s|ed|ing)?": "flip horizontally",
    r"(?<!standard )(?<!squared )deviation": "std",
    r"people('s)?": "users, annotators",
    r"told": "given, reported",
    r"go(es)? on": "resume, continue",
    r"for_people": "UserError",
    r"the house": "the repository",
}
KEPT = {  # file: text that is data or the name of something else
    "dataset/text/prompts.py": ('"picture"',),  # NXTP's prompts
    "tests/unit/test_digitscenes.py": (
        "the left picture",
        "the right picture",
        "the two pictures",
    ),  # sentences of NLVR
    "scripts/data/extract_nouns.py": ('"mended"',),  # the option's old name
}
DATA = ("dataset/digitscenes/words.py", "dataset/digitscenes/tasks.py", "docs/BENCHMARKS.md")
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b{word}\b)" for i, word in enumerate(WORDS)), re.I)


def text_files() -> list[Path]:
    """Code, recipes, scripts and docs, without data and figures of earlier runs."""
    found = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "run.sh"]
    folders = ("base", "benchmarks", "configs", "dataset", "docs", "evaluation", "models")
    for folder in (*folders, "runtime", "scripts", "tests"):
        for ending in ("py", "md", "yaml", "sh", "j2"):
            found += (ROOT / folder).rglob(f"*.{ending}")
    left_out = {ROOT / name for name in DATA} | {Path(__file__)}
    return [path for path in found if path not in left_out]


def unusual(text: str) -> list[str]:
    """`word: what the field says` for each word of the text that the glossary replaces."""
    found = []
    for match in PATTERN.finditer(text):
        use = list(WORDS.values())[int(match.lastgroup[1:])]
        found.append(f"{match[0]}: {use}")
    return found


@pytest.mark.parametrize("text", ["A mended picture", "it goes on", "mean and deviation"])
def test_words_of_the_glossary_are_found(text):
    assert unusual(text)


def test_the_whole_repository_uses_the_words_of_the_field():
    wrong = []
    for path in text_files():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for kept in KEPT.get(name, ()):
                line = line.replace(kept, "")
            wrong += [f"{name}:{number}: {word}" for word in unusual(line)]
    assert not wrong, "\n".join(wrong)
