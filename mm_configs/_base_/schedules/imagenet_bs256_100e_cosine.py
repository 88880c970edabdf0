# 100 epochs of 256 images a step, as in the paper: SGD, the learning rate falls from 0.1 to 0 along a cosine
max_epochs = 100
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='OptimWrapper',  # 'AmpOptimWrapper' for mixed precision
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4))

param_scheduler = dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True)

# --auto-scale-lr adapts the learning rate to another total batch
auto_scale_lr = dict(base_batch_size=256)
