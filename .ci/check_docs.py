"""Check the documentation against the code and the committed results.

    python .ci/check_docs.py

The method fits its budget, the README its length; every relative link and every path in backticks exists; every
command names flags that its program has; the marked tables of the ablation's page are those of the committed results.
"""

import re
import subprocess
import sys
from pathlib import Path

from minidoctor.study.report import committed_table
from minidoctor.study.sequence_report import committed_overview, committed_split

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minidoctor"
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted(PACKAGE.glob("*/README.md"))]
PROGRAMS = {"train.py": ["train.py"], "sample.py": ["sample.py"]} | {
    f"-m minidoctor.{path.parent.name}": ["-m", f"minidoctor.{path.parent.name}"]
    for path in sorted(PACKAGE.glob("*/__main__.py"))
}
problems: list[str] = []


def check(condition: bool, problem: str) -> None:
    if not condition:
        problems.append(problem)


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def check_budgets() -> None:
    method = sorted(PACKAGE.glob("*.py"))
    total = sum(map(n_lines, method))
    check(len(method) <= 11, f"{len(method)} files directly in minidoctor/, at most 11")
    check(total <= 1300, f"{total} lines directly in minidoctor/, at most 1,300")
    for path in [*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]:
        check(n_lines(path) <= 300, f"{path.relative_to(ROOT)}: {n_lines(path)} lines, at most 300")
    readme = ROOT / "README.md"
    check(n_lines(readme) <= 130, f"README.md: {n_lines(readme)} lines, at most 130")


def check_reading_path() -> None:
    """The reading path lists the method's files in their order, each with its number of lines."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\S* \| (\d+) \|", readme, re.MULTILINE)
    listed = re.search(r"imports only files above it and ops/:\n(.*?)\.", (PACKAGE / "__init__.py").read_text(), re.S)
    order = listed[1].replace("\n", " ").split(", ") if listed else []
    check([name for name, _ in rows] == order, f"README.md: the reading path is {rows}, the method's order is {order}")
    for name, lines in rows if [name for name, _ in rows] == order else []:
        actual = n_lines(PACKAGE / f"{name}.py")
        check(actual == int(lines), f"README.md: {name}.py has {actual} lines, the reading path says {lines}")


def check_links() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in [*re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose), *re.findall(r'src="([^"]+)"', prose)]:
            if not re.match(r"https?:", target):
                check((page.parent / target).exists(), f"{page.relative_to(ROOT)}: link to {target}, which is missing")
        for target in re.findall(r"`((?:minidoctor|data|tests|\.ci)/[\w./-]+\.\w+)`", prose):
            check((ROOT / target).exists(), f"{page.relative_to(ROOT)}: {target} is missing")


def check_commands() -> None:
    """Every flag in a command of a page is one that the program's --help lists."""
    flags = {}
    for name, command in PROGRAMS.items():
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        flags[name] = set(re.findall(r"--[a-z][\w-]*", done.stdout))
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(
            r"(?:python|torchrun\b[^\n`]*?) +((?:train\.py|sample\.py|-m minidoctor\.\w+)[^\n`&|]*)", text
        ):
            name = next((name for name in PROGRAMS if command.startswith(name)), None)
            check(name is not None, f"{page.relative_to(ROOT)}: unknown program in {command!r}")
            for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", command.split("#")[0]) if name else []:
                check(flag in flags[name], f"{page.relative_to(ROOT)}: {name} has no {flag}")


def check_ablation() -> None:
    """The tables of the ablation's page are those of the committed results."""
    page = (PACKAGE / "study" / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r'<!-- table: (\S+) minus "(.+?)" -->\n(.*?)\n<!-- end -->', page, re.DOTALL)
    check(len(tables) == 5, f"minidoctor/study/README.md: {len(tables)} marked tables, expected 5")
    for file, baseline, table in tables:
        check(committed_table(file, baseline) == table, f"minidoctor/study/README.md: the table of {file} differs")
    splits = re.findall(r'<!-- split: (\S+) by "(.+?)" -->\n(.*?)\n<!-- end -->', page, re.DOTALL)
    check(len(splits) == 5, f"minidoctor/study/README.md: {len(splits)} marked splits, expected 5")
    for file, split, tables in splits:
        check(committed_split(file, split) == tables, f"minidoctor/study/README.md: {split} of {file} differs")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    check(committed_overview() in readme, "README.md: the table of the two stages differs from the study's results")


def main() -> None:
    for check_something in (check_budgets, check_reading_path, check_links, check_commands, check_ablation):
        check_something()
    print("\n".join(problems) or "the documentation agrees with the code")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
