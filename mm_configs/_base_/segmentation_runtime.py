_base_ = 'mmseg::_base_/default_runtime.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# data, classes and heads that do not fit are errors that name the file
custom_hooks = [dict(type='CheckSetupHook')]
