import doctest
import pathlib
import re

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "adding_a_method.md").read_text()


def test_the_page_does_what_it_says():
    blocks = "\n".join(re.findall(r"```python\n(>>>.*?)```", PAGE, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(blocks, {}, "adding_a_method.md", "adding_a_method.md", 0)
    assert len(test.examples) > 15
    out = []
    doctest.DocTestRunner().run(test, out=out.append)
    assert not out, "".join(out)
