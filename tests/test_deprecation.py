"""An old name does what the new one does, and says until when."""
import sys
import types

import pytest

from san_backbones._deprecation import renamed, renamed_arguments


def test_an_old_name_of_a_module(monkeypatch):
    module = types.ModuleType('made_up')
    module.new_name = object()
    module.__getattr__ = renamed('made_up', '0.9', old_name='new_name')
    monkeypatch.setitem(sys.modules, 'made_up', module)
    with pytest.warns(DeprecationWarning, match=r'made_up\.old_name is now made_up\.new_name; .* san-backbones 0\.9') \
            as said:
        assert module.old_name is module.new_name
    assert said[0].filename == __file__  # whose line it is that has to change
    with pytest.raises(AttributeError, match="module 'made_up' has no attribute 'other'"):
        module.other  # noqa: B018


def test_an_old_argument():
    @renamed_arguments('0.9', colour='color')
    def paint(what, color='red'):
        """Docs."""
        return what, color

    assert paint('door', color='blue') == ('door', 'blue') and paint.__doc__ == 'Docs.'
    with pytest.warns(DeprecationWarning, match=r"the argument 'colour' of paint\(\) is now 'color'; .* 0\.9") as said:
        assert paint('door', colour='green') == ('door', 'green')
    assert said[0].filename == __file__
    with pytest.raises(TypeError, match="got 'colour' and 'color'"):
        paint('door', colour='green', color='blue')
