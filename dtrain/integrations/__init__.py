"""dtrain in trainers that step the optimizer, evaluate and save themselves; one line each.

    dtrain.integrations.hf.sync_with(trainer, method)                       transformers.Trainer, TRL, PEFT
    dtrain.integrations.lightning.SyncStrategy(method)                      Lightning's Trainer, DDP
    dtrain.integrations.lightning.ShardedSyncStrategy(method)               Lightning's Trainer, FSDP2
    dtrain.integrations.fabric.Synced(fabric, model, optimizer, method)     Lightning Fabric
    dtrain.integrations.accelerate.Synced(accelerator, model, optimizer, method)

Each is a module that imports its framework when it is itself imported.
"""
