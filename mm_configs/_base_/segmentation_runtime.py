_base_ = 'mmseg::_base_/default_runtime.py'

# data, classes and heads that do not fit are errors that name the file; feature maps that are not finite in an
# evaluation are a warning that names the layer
custom_hooks = [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]
