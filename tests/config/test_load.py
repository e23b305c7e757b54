"""Loading a config by the name that a command line gives."""

import textwrap

import fiddle as fdl
import pytest

from moejax.config.load import load_config
from moejax.errors import UserError

BASE = """
    from fiddle.experimental.auto_config import auto_config
    import toy_experiment as toy

    @auto_config
    def config():
        return toy.Run(steps=5, block=toy.Block(ffn=toy.FFN(num_experts=4)),
                       data=toy.Data(sources=(toy.Text(path="a"),)))

    def smoke():
        cfg = config.as_buildable()
        cfg.steps = 2
        return cfg

    def with_an_instance():
        cfg = config.as_buildable()
        cfg.block.ffn.router = toy.Top(k=9)
        return cfg

    def number():
        return 3

    def fails():
        missing = {}
        return missing["here"]

    def _helper():
        return 1

    def needs(argument):
        return argument
"""


@pytest.fixture
def base(tmp_path):
    return write(tmp_path, "base_toy.py", BASE)


def write(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def error_of(spec):
    with pytest.raises(UserError) as caught:
        load_config(spec)
    return str(caught.value)


def test_config_is_the_default_function(base):
    assert load_config(base).steps == 5


def test_a_plain_function_after_the_colon(base):
    assert load_config(f"{base}:smoke").steps == 2


def test_an_instance_in_a_config_becomes_a_config(base):
    router = load_config(f"{base}:with_an_instance").block.ffn.router
    assert isinstance(router, fdl.Config)
    assert router.__arguments__ == {"k": 9}


def test_a_three_line_config_edits_another(base):
    mine = write(
        base.parent,
        "mine_toy.py",
        """
        import fiddle as fdl
        import base_toy
        import toy_experiment as toy

        class MyRouter(toy.Top):
            sharpness: float = 2.0

        def config():
            cfg = base_toy.config.as_buildable()
            cfg.block.ffn.router = fdl.Config(MyRouter)
            return cfg
        """,
    )
    built = fdl.build(load_config(str(mine)))
    assert type(built.block.ffn.router).__name__ == "MyRouter"
    assert built.block.ffn.router.sharpness == 2.0


def test_a_changed_file_is_read_again(base):
    load_config(base)
    base.write_text(base.read_text().replace("steps=5", "steps=6"))
    assert load_config(base).steps == 6


def test_a_missing_file_names_the_nearest(base):
    assert error_of(base.parent / "base_tpy.py") == (
        f"there is no file '{base.parent}/base_tpy.py'; did you mean {base}?"
    )
    assert "; did you mean" not in error_of(base.parent / "zzz")


def test_a_missing_function_lists_what_there_is(base):
    message = error_of(f"{base}:smok")
    assert f"has no config function 'smok'; did you mean {base}:smoke?" in message
    assert f"(it has: {base}:config, {base}:smoke, " in message
    assert "_helper" not in message
    assert ":needs" not in message
    assert "auto_config" not in message


def test_another_return_value_is_an_error(base):
    assert f"{base}:number returned int, not a fdl.Config: decorate it" in error_of(
        f"{base}:number"
    )


def test_a_function_that_raises_shows_its_line(base):
    message = error_of(f"{base}:fails")
    assert message.startswith(f"{base}, line 25 raised KeyError: 'here'")
    assert 'return missing["here"]' in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\ny = x / 0\n", "line 2 raised ZeroDivisionError: division by zero\n    y = x / 0"),
        ("x = 1\nimport nothere\n", "line 2 raised ModuleNotFoundError: No module named 'nothere'"),
        ("x = 1\ndef f(:\n", "line 2 raised SyntaxError: "),
    ],
)
def test_a_file_that_raises_shows_its_line(tmp_path, text, message):
    path = write(tmp_path, "broken_toy.py", text)
    assert message in error_of(path)


def test_control_flow_under_auto_config_is_explained(tmp_path):
    path = write(
        tmp_path,
        "flow_toy.py",
        """
        from fiddle.experimental.auto_config import auto_config
        @auto_config
        def config():
            if 1:
                return dict(a=1)
        """,
    )
    assert "Control flow" in error_of(path)


def test_a_folder_that_is_no_run(base):
    assert error_of(base.parent) == (
        f"{base.parent} is no run: it holds no config.json; it holds base_toy.py"
    )


def test_a_file_that_is_no_python(tmp_path):
    path = write(tmp_path, "notes.txt", "hello")
    assert "is no config: name a .py file or the folder of a run" in error_of(path)
