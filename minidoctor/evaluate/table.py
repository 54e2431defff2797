"""The summary of an evaluation as a text table."""

from minidoctor.evaluate.free_form import RULE
from minidoctor.evaluate.summary import Accuracy, Summary

BASELINES = {
    "random": "chance",
    "most_frequent": "always the most frequent answer",
    "longest_option": "always the longest option",
}
COUNTS = ("unanswered", "unfinished")


def line(name: str, method: str | None, accuracy: Accuracy, n: int | None = None) -> str:
    low, high = accuracy.interval or (0.0, 0.0)
    interval = f"{low:.1%} - {high:.1%}" if low < high else ""
    share = "-" if accuracy.accuracy is None else f"{accuracy.accuracy:.1%}"
    counts = [getattr(accuracy, count, 0) for count in COUNTS]
    shares = "".join(f"{f'{count} ({count / accuracy.n:.1%})' if count else '':>15}" for count in counts)
    return f"{name:32}{method:20}{share:>8}  {interval:17}{n or accuracy.n:>6}{shares}".rstrip()


def group_lines(name: str, group: Summary, baselines: bool) -> list[str]:
    lines = []
    if group.n:
        lines.append(line(name, group.scoring, group))
        if group.multiple_answers.n:
            lines.append(line("  one correct letter", group.scoring, group.single_answer))
            lines.append(line("  several correct letters", group.scoring, group.multiple_answers))
        lines += [line("", method, accuracy) for method, accuracy in group.methods.items()]
    if group.n_free_form:
        lines.append(line(name, "free-form", Accuracy(group.free_form_accuracy, group.n_free_form, None)))
    if group.nll is not None:
        lines.append(f"{'' if lines else name:32}{'loss':20}{group.nll:>8.3f}  nats per token")
    if group.n and baselines:
        shares = [f"{text} {group.trivial_baselines[key]:.1%}" for key, text in BASELINES.items()]
        lines.append(f"  trivial baselines: {', '.join(shares)}")
    return lines


def format_summary(summary: Summary) -> str:
    counts = "".join(f"{count:>15}" for count in COUNTS)
    lines = [f"{'':32}{'scoring method':20}{'accuracy':>8}  {'95 % interval':17}{'n':>6}{counts}"]
    lines += group_lines("all", summary, baselines=True)
    if len(summary.languages) > 1:
        for name, group in summary.languages.items():
            lines += group_lines(name, group, baselines=False)
    for kind, languages in summary.kinds.items():
        lines += [line(f"{kind}, {name}", "", accuracy) for name, accuracy in languages.items()]
    for name, scope in summary.scope.items():
        lines.append(line(f"no fact if out of scope, {name}", "", scope.refusals))
        lines.append(line(f"false refusals, {name}", "", scope.false_refusals))
    for name, exam in summary.exams.items():
        if len(summary.exams) > 1 or summary.n != exam.n:
            lines += group_lines(name, exam, baselines=True)
        lines += [line(f"  {part}", exam.scoring, accuracy) for part, accuracy in exam.parts.items()]
        if len(exam.parts) > 1 and exam.mean_of_parts:
            lines.append(line("  mean of these", exam.scoring, exam.mean_of_parts, exam.n))
    for name, file in summary.files.items():
        if file.n_trained_on is not None:
            lines.append(f"{name}: {file.n_trained_on} of {file.n} questions occur in the training questions")
        if file.n_trained_on:
            lines += group_lines("  the other questions", file.others, baselines=False)
    if summary.n_free_form:
        lines.append(f"free-form: {RULE}")
    if len(summary.shots) > 1:
        counts = ", ".join(f"{n} in {count} questions" for n, count in summary.shots.items())
        lines.append(f"few-shot examples in the prompt: {counts}")
    if summary.too_long:
        lines.append(f"{summary.too_long} questions do not fit into the model's context: unanswered")
    if summary.truncated:
        counts = f"{summary.truncated} of {summary.n_generated} ({summary.truncated / summary.n_generated:.1%})"
        lines.append(f"{counts} generated answers ended at --max-new-tokens or at the end of the context")
    if summary.without_answer:
        lines.append(f"{summary.without_answer} questions have no known answer: predicted, not counted")
    return "\n".join(lines)
