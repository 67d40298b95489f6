"""Converts the GSM8K files of iCoT (github.com/da03/Internalize_CoT_Step_by_Step) into data files.

A line is `question||<<step>> <<step>> #### answer`. Steps contain no spaces. A line without steps gets an empty list,
where the reference's converter makes one empty step. `gsm_icot.bash` downloads the files and runs this script.

    python preprocessing/gsm_icot.py train.txt data/gsm_train.json
"""

import sys
from pathlib import Path

from files import UserError, command, each, make_parser, print_result, publish, read_text


def parse_line(line: str) -> dict:
    """Converts one line. Raises ValueError that says what is wrong with it."""
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
    """Converts all lines of a file. Raises UserError that names the file and the first malformed line."""
    # not splitlines(), which also splits at characters such as U+2028 inside a question
    lines = enumerate(read_text(path).rstrip("\r\n").split("\n"), start=1)
    return each(parse_line, ((f"line {number}", line) for number, line in lines), path)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, help="text file of iCoT")
    parser.add_argument("target", type=Path, help="JSON file to write")
    parser.add_argument("--expect", type=int, metavar="N", help="write the file only if there are N examples")
    options = parser.parse_args(arguments)
    examples = convert(options.source)
    if options.target.exists() and options.target.samefile(options.source):
        raise UserError(f"{options.target} is both the source and the target")
    if options.expect not in (None, len(examples)):
        raise UserError(f"{options.source} holds {len(examples):,} examples, not {options.expect:,}")
    publish({options.target: examples})
    without = sum(not example["steps"] for example in examples)
    print_result(f"{options.target}: {len(examples)} examples, {without} of them without steps")


if __name__ == "__main__":
    sys.exit(main())
