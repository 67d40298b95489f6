"""Converts GSM8K as iCoT publishes it (github.com/da03/Internalize_CoT_Step_by_Step) into this project's format.

A line is `question||<<step>> <<step>> #### answer`; steps hold no spaces, and a line may have none: its list of steps
is empty, where the reference's converter makes one empty step. `gsm_icot.bash` downloads the files and calls this.

    python preprocessing/gsm_icot.py train.txt data/gsm_train.json
"""

import sys
from pathlib import Path

from files import UserError, command, each, make_parser, publish, read_text


def parse_line(line: str) -> dict:
    """One example. Raises ValueError with what is wrong with the line."""
    question, bars, rest = line.rstrip("\r").partition("||")
    steps, mark, answer = rest.partition("####")
    answer = answer.strip()
    if not bars:
        raise ValueError("has no '||' between the question and the steps")
    if "||" in rest:
        raise ValueError("has more than one '||'")
    if not mark:
        raise ValueError("has no '####' before the answer")
    if not question.strip() or not answer or "#" in answer:
        raise ValueError("has an empty question, or no answer, or more than one answer")
    return {"question": question, "steps": steps.split(), "answer": answer}


def convert(path: Path) -> list[dict]:
    """All examples of a file. Raises UserError that names the file, and the line that cannot be read."""
    # not splitlines(): a question may hold the other characters that it takes for line ends
    lines = enumerate(read_text(path).rstrip("\r\n").split("\n"), start=1)
    return each(parse_line, ((f"line {number}", line) for number, line in lines), path)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, help="a text file of iCoT")
    parser.add_argument("target", type=Path, help="the JSON file to write")
    parser.add_argument("--expect", type=int, metavar="N", help="write nothing unless there are N examples")
    options = parser.parse_args(arguments)
    if options.target.exists() and options.target.samefile(options.source):
        raise UserError(f"{options.target} is both the source and the target")
    examples = convert(options.source)
    if options.expect not in (None, len(examples)):
        raise UserError(f"{options.source} holds {len(examples):,} examples, not {options.expect:,}")
    publish({options.target: examples})
    without = sum(not example["steps"] for example in examples)
    print(f"{options.target}: {len(examples)} examples, {without} of them without steps")


if __name__ == "__main__":
    sys.exit(main())
