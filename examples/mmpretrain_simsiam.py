"""SimSiam with mmpretrain on a folder of images: a config, as for its tools/train.py."""

custom_imports = dict(imports=["mmpretrain.models"], allow_failed_imports=False)
default_scope = "mmpretrain"

model = dict(
    type="SimSiam",
    backbone=dict(
        type="ResNet", depth=18, stem_channels=8, base_channels=8, norm_cfg=dict(type="BN")
    ),
    neck=dict(
        type="NonLinearNeck",
        in_channels=64,
        hid_channels=32,
        out_channels=16,
        num_layers=2,
        with_last_bn=False,
        norm_cfg=dict(type="BN1d"),
    ),
    head=dict(
        type="LatentPredictHead",
        loss=dict(type="CosineSimilarityLoss"),
        predictor=dict(
            type="NonLinearNeck",
            in_channels=16,
            hid_channels=8,
            out_channels=16,
            with_avg_pool=False,
            with_last_bn=False,
            norm_cfg=dict(type="BN1d"),
        ),
    ),
    data_preprocessor=dict(type="SelfSupDataPreprocessor"),
)

view = [
    dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.2, 1.0)),
    dict(type="RandomFlip", prob=0.5),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="CustomDataset",
        data_root="images",
        with_label=False,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="MultiView", num_views=2, transforms=[view]),
            dict(type="PackInputs"),
        ],
    ),
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=3)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9), accumulative_counts=2)
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1))
