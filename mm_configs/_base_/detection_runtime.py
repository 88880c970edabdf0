_base_ = 'mmdet::_base_/default_runtime.py'

# data, classes and heads that do not fit are errors that name the file; the layer that makes an
# evaluation not finite is named in the log
custom_hooks = [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]
