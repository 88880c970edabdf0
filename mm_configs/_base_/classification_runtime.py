_base_ = 'mmpretrain::_base_/default_runtime.py'

# data, classes and heads that do not fit are errors that name the file
custom_hooks = [dict(type='CheckSetupHook')]
