import subprocess
import sys

import pytest

from tiltjax.rewards.gate import required_columns
from tiltjax.rewards.puzzles import puzzle_rows
from tiltjax.rewards.registry import SHIPPED, load_reward, reward_code


def test_every_shipped_reward_loads_and_rewards():
    columns = {"answer": ["12"], "reference": ["it is 12"]}
    out = {}
    for name in SHIPPED.keys() - {"imdb"}:  # It needs a file: `tests/rewards/classifier_test.py`.
        reward = load_reward(name)
        out[name] = reward(["p"], ["it is 12"], **{column: columns[column] for column in required_columns(reward)})
    assert out == {
        "brevity": [0.0],
        "exact_match": [1.0],
        "length": [-37 / 40],
        "math": [1.0],
        "rouge_l": [1.0],
        "sentiment": [0.0],
    }


def test_options():
    assert load_reward("length?target=4")([""], ["one two"]) == [-0.5]
    row = puzzle_rows("chain_sum", size=1, seed=0, min_terms=2, max_terms=2)[0]
    reward = load_reward("reasoning_gym:chain_sum?min_terms=2&max_terms=2")
    assert reward([row["prompt"]], [row["answer"]], [row["entry"]]) == [1.0]
    assert load_reward("math?timeout=2")([""], ["1/2"], ["0.5"]) == [1.0]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def first(prompts, completions):\n"
        "    return [float(len(c)) for c in completions]\n"
        "def scaled(*, by, tag='x'):\n"
        "    def reward(prompts, completions):\n"
        "        return [by * len(c) for c in completions]\n"
        "    reward.tag = tag\n"
        "    return reward\n"
        "class Box:\n"
        "    first = staticmethod(first)\n"
        "def no_reward(*, by):\n"
        "    return by\n"
        "number = 3\n"
        "import functools, os\n"
        "from os import system as shell\n"
        "print = print\n"
        "bound = functools.partial(lambda prompts, completions, by: [by * len(c) for c in completions], by=2.0)\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.usefixtures("module")
class TestModules:
    def test_a_function_an_attribute_of_one_and_what_makes_one(self):
        assert load_reward("my_rewards:first")([""], ["abc"]) == [3.0]
        assert load_reward("my_rewards:Box.first")([""], ["abc"]) == [3.0]
        assert load_reward("my_rewards:scaled?by=0.5")([""], ["abc"]) == [1.5]

    @pytest.mark.parametrize(
        ("text", "value"), [("a=b?c", "a=b?c"), ("true", True), ('["+", "-"]', ["+", "-"]), ('"3"', "3"), ("", "")]
    )
    def test_a_value_is_json_or_text(self, text, value):
        assert load_reward(f"my_rewards:scaled?by=1&tag={text}").tag == value

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("my_rewards:absent", "module 'my_rewards' has no attribute 'absent'"),
            ("my_rewards:Box.absent", "has no attribute 'Box.absent'"),
            ("my_rewards:number", "'my_rewards:number' must be callable, got int"),
            ("my_rewards:number?by=1", "must be callable, got int"),
            ("my_rewards:no_reward?by=1", "must be callable, got int"),
            ("my_rewards:scaled?of=1", r"its options are \(\*, by, tag='x'\)"),
            ("no_such_module:f", "module 'no_such_module' cannot be imported: ModuleNotFoundError"),
            ("broken_rewards:f", "module 'broken_rewards' cannot be imported: .*a_package_that_is_not_there"),
        ],
    )
    def test_what_cannot_be_loaded_is_named(self, spec, message):
        with pytest.raises(ValueError, match=message):
            load_reward(spec)

    @pytest.mark.robustness(
        "Flags",
        given="--reward=os:system, or another name of Python's own library",
        outcome="refused, not imported",
    )
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("os:system", "os is Python's own library"),
            ("subprocess:run", "subprocess is Python's own library"),
            ("builtins:print", "builtins is Python's own library"),
            ("posix:system", "posix is Python's own library"),
            ("my_rewards:os.system", "goes through another module"),
            ("my_rewards:shell", "shell is of Python's own library"),
            ("my_rewards:print", "print is of Python's own library"),
        ],
    )
    def test_pythons_own_library_is_no_reward(self, spec, message):
        with pytest.raises(ValueError, match=message):
            load_reward(spec)

    def test_a_partial_of_a_reward_is_one(self):
        assert load_reward("my_rewards:bound")([""], ["abc"]) == [6.0]


@pytest.fixture
def lone(tmp_path, monkeypatch):
    """A file of the current directory, which ``python -m`` puts first on the path."""
    (tmp_path / "kind").mkdir()
    (tmp_path / "kind" / "__init__.py").write_text("def f(prompts, completions):\n    return [1.0]\n")
    (tmp_path / "lone_reward.py").write_text("print('it runs')\ndef f(prompts, completions):\n    return [2.0]\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.robustness(
    "Flags",
    given="--reward=name:f, where name.py lies in the current directory",
    outcome="not run: name the file",
)
def test_a_file_is_run_where_it_is_named(lone, capsys, monkeypatch):
    line = "lone_reward is a file of the current directory; name it, lone_reward.py:f\\?a=1"
    with pytest.raises(ValueError, match=line):
        load_reward("lone_reward:f?a=1")
    assert capsys.readouterr().out == ""
    for spec in ("lone_reward.py:f", "./lone_reward.py:f", f"{lone}/lone_reward.py:f"):
        assert load_reward(spec)([""], [""]) == [2.0]
    assert capsys.readouterr().out == "it runs\n"
    assert load_reward("kind:f")([""], [""]) == [1.0]  # A package is named on purpose.
    monkeypatch.setenv("PYTHONPATH", str(lone))
    assert load_reward("lone_reward:f")([""], [""]) == [2.0]
    for spec, message in (
        ("absent.py:f", "file 'absent.py' cannot be imported: FileNotFoundError"),
        ("leaving.py:f", "file 'leaving.py' cannot be imported: SystemExit"),
        ("leaving:f", "module 'leaving' cannot be imported: SystemExit"),
        ("lone_reward.py:g", "has no attribute 'g'"),
        (".lone_reward:f", "cannot be imported"),
        ("lone_reward.py:", "unknown reward"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(spec)


@pytest.mark.parametrize("spec", ["sentimant", "", "module:", ":function", "reasoning_gym", "?target=3"])
def test_an_unknown_name_lists_the_known(spec):
    known = "brevity, exact_match, imdb, length, math, rouge_l, sentiment, reasoning_gym:task, package.module:attribute"
    with pytest.raises(ValueError, match=f"unknown reward .*; it must be one of {known}"):
        load_reward(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length?", "options of a reward must read key=value&key=value, each key once; got ''"),
        ("length?target", "got 'target'"),
        ("length?4=4", "got '4=4'"),
        ("length?target=4&target=5", "got 'target=5'"),
        ("length?goal=4", r"unexpected keyword argument 'goal'; its options are .*target"),
        ("length?target=0", "target must be at least 1, got 0"),
        ("length?target=short", "target must be an integer, got 'short'"),
        ("math?timeout=2.5", "timeout must be an integer, got 2.5"),
        ("length?target=true", "target must be an integer, got True"),
        ("sentiment?target=4", "reward 'sentiment' has no options; got target"),
        ("reasoning_gym:", "task must be one of .* got ''"),
        ("reasoning_gym:chess_boxing", "task must be one of .* got 'chess_boxing'"),
        ("reasoning_gym:gcd?task=1", "task 'gcd' cannot be made with"),
        ("reasoning_gym:gcd?max_value=-1", "task 'gcd' cannot be made with"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


@pytest.mark.parametrize(
    ("spec", "package"),
    [
        ("sentiment", "vaderSentiment"),
        ("rouge_l", "rouge_score"),
        ("math", "math_verify"),
        ("reasoning_gym:gcd", "reasoning_gym"),
    ],
)
def test_a_missing_package_is_an_error_at_once_and_says_how_to_install_it(spec, package, monkeypatch):
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package '{package}.*pip install 'tiltjax\[rewards\]'"):
        load_reward(spec)


def test_importing_the_rewards_imports_no_optional_package():
    code = (
        "import sys, tiltjax.rewards, tiltjax.rewards.registry, tiltjax.rewards.gate, tiltjax.rewards.puzzles\n"
        "import tiltjax.rewards.sentiment, tiltjax.rewards.text, tiltjax.rewards.verifiers\n"
        "heavy = {'vaderSentiment', 'rouge_score', 'nltk', 'math_verify', 'sympy', 'reasoning_gym', 'flax'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out


@pytest.mark.robustness(
    "Runs",
    given="a reward whose file, or a file beside it that it imports, was edited between a run and its --resume",
    outcome="its code has another fingerprint: the run is refused, and so are its kept candidates",
)
def test_the_code_of_a_reward_has_a_fingerprint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_rewards.py").write_text(
        "from edited_helper import half\ndef reward(p, c):\n    return half(c)\n"
    )
    (tmp_path / "edited_helper.py").write_text("def half(c):\n    return [len(x) / 2 for x in c]\n")
    (tmp_path / "another.py").write_text("x = 1\n")

    def code():
        load_reward("edited_rewards:reward")
        return reward_code("edited_rewards:reward?by=3")

    first = code()
    (tmp_path / "another.py").write_text("x = 2\n")
    assert code() == first
    (tmp_path / "edited_helper.py").write_text("def half(c):\n    return [len(x) / 3 for x in c]\n")
    second = code()
    with (tmp_path / "edited_rewards.py").open("a") as file:
        file.write("# A word more.\n")
    assert len({first, second, code()}) == 3
    shipped = {name: reward_code(name) for name in ("length?target=3", "brevity", "reasoning_gym:chain_sum")}
    assert shipped["length?target=3"] == shipped["brevity"] != shipped["reasoning_gym:chain_sum"]
    for name in ("edited_rewards", "edited_helper"):
        sys.modules.pop(name)


@pytest.mark.robustness(
    "Flags",
    given="--reward=module:function of a module, or of a function that makes a reward, that ends the process or raises",
    outcome="one line with the reward and the error, status 2",
)
def test_a_module_that_ends_the_process_is_an_error_of_the_reward(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving_rewards.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match="module 'leaving_rewards' cannot be imported: SystemExit"):
        load_reward("leaving_rewards:reward")
    (tmp_path / "making_rewards.py").write_text("def make(*, by):\n    raise SystemExit(by)\n")
    with pytest.raises(ValueError, match=r"'making_rewards:make\?by=1': SystemExit: 1"):
        load_reward("making_rewards:make?by=1")
    sys.modules.pop("making_rewards")
