"""One step of training, from top to bottom: two views of each image; a third with a patch over the place that was most
activated when the image came last; one forward pass of all three; the loss; one backward pass, whose gradients also say
where the next patch goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipeline.beton import Build
from data_pipeline.loader import Batch, Loader, Partitions, open_loader
from data_pipeline.views import ViewParameters, draw_parameters, render_views
from trainer import checkpoint
from trainer.attribution import PeakStore, else_random, first_view_gradients, frozen_statistics, places, random_places
from trainer.batch_norm import agree_on_statistics, synchronise
from trainer.config import TrainConfig
from trainer.distributed import rank, world_size
from trainer.encoder import Encoder, compile_stages, load_encoder
from trainer.engine import autocast_dtype, make_engine, micro_batch_size, read_deepspeed_config
from trainer.methods import Method, method_of
from trainer.mixing import Mixed, draw_gamma, mix, partners


class Trainer:
    """Everything one training run holds: data, views, method, engine, peaks."""

    def __init__(self, config: TrainConfig, partitions: Partitions) -> None:
        self.config, self.partitions = config, partitions
        self.build, self.device = partitions.build, partitions.device
        device = self.device
        deepspeed_config = read_deepspeed_config(config.deepspeed_config, device)
        self.autocast_dtype = autocast_dtype(deepspeed_config)
        # A step of the optimizer may take several batches.
        self.accumulation = deepspeed_config.get("gradient_accumulation_steps", 1)
        micro_batch = micro_batch_size(config.batch_size, world_size(), self.accumulation)
        self.loader: Loader = open_loader(
            partitions,
            micro_batch,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            accumulation=self.accumulation,
            cache=config.cache,
        )
        self.peaks = PeakStore(self.loader.count, config.mixing.num_patches, device)

        torch.manual_seed(config.seed)  # initial weights; all other random numbers are functions of their place
        encoder = new_encoder(config, self.build)
        if config.init_from is not None:
            load_encoder(encoder, config.init_from)
        if config.batch_norm == "global" and world_size() > 1:
            encoder = synchronise(encoder, device)
        steps_per_epoch = len(self.loader) / self.accumulation
        self.engine = make_engine(
            encoder.to(device),
            config.optimizer,
            deepspeed_config,
            micro_batch=micro_batch,
            total_steps=round(steps_per_epoch * config.total_epochs),
            warmup_steps=round(steps_per_epoch * config.optimizer.warmup_epochs),
        )
        if config.compile:
            compile_stages(self.engine.module)

        dtype = self.autocast_dtype
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        self.method: Method = method_of(config, self.portable_encoder, self.autocast)

    def portable_encoder(self) -> Encoder:
        """A float32 copy of the encoder outside of the engine."""
        encoder = new_encoder(self.config, self.build)
        encoder.load_state_dict(self.engine.module.state_dict())
        return encoder.to(self.device)

    @property
    def memories(self) -> dict[str, checkpoint.Memory]:
        """What a checkpoint holds beside the engine."""
        return {"peaks": self.peaks, **self.method.memories}

    def train_step(self, batch: Batch, epoch: int, step: int) -> Tensor:
        """One forward, backward and update; returns the method's loss parts in their order, on the device."""
        mixing, settings = self.config.mixing, self.config.objective_at(epoch)
        mixes = mixing.kind != "none" and settings.takes_mixed_views
        layers = mixing.layers if mixes and mixing.uses_peaks else ()
        first, second = self.parameters(batch, epoch, 0), self.parameters(batch, epoch, 1)
        if mixes:
            views, mixed = self.mixed_views(batch, first, second, epoch, step)
        else:
            views, mixed = self.render(batch, first, second), None
        retain = layers if mixing.peaks_from == "previous_epoch" else ()
        seen, keys = self.method.split(views, len(batch.images), epoch=epoch, step=step)
        encoded = self.engine(seen, retain)
        for feature_map in encoded.maps.values():
            feature_map.retain_grad()
        losses = self.method.losses(encoded, keys, batch.labels, mixed, settings)
        self.engine.backward(losses.total)
        if retain:
            maps = first_view_gradients(encoded.maps, len(batch.images))
            found = places(*maps, mixing, batch.indices, seed=self.config.seed, epoch=epoch)
            self.peaks.update(batch.indices, first.geometry.to_source(found))
        self.engine.step()
        self.method.remember(keys, self.engine.module, updated=(step + 1) % self.accumulation == 0)
        return torch.stack(losses).detach()

    def synchronise(self) -> None:
        """Bring what each rank has learnt by itself together, so that all have the same. All ranks call it."""
        self.peaks.synchronise()
        if self.config.batch_norm != "global":
            agree_on_statistics(self.engine.module)

    def parameters(self, batch: Batch, epoch: int, number: int) -> ViewParameters:
        """What makes view `number` of each image of the batch."""
        return draw_parameters(
            self.config.views,
            tuple(batch.images.shape[1:3]),
            batch.indices,
            seed=self.config.seed,
            epoch=epoch,
            view=number,
        )

    def render(self, batch: Batch, first: ViewParameters, second: ViewParameters, **patches: Any) -> Tensor:
        """The views of the batch in blocks (2N, C, h, w), or with `patches` as `render_views` takes them (3N, …)."""
        info = self.build.protocol.info
        return render_views(
            batch.images,
            first,
            second,
            size=self.build.manifest.image_size,
            mean=info.mean,
            std=info.std,
            dtype=self.autocast_dtype or torch.float32,
            **patches,
        )

    def mixed_views(
        self, batch: Batch, first: ViewParameters, second: ViewParameters, epoch: int, step: int
    ) -> tuple[Tensor, Mixed]:
        """The views of the batch and the third made from them, in blocks (3N, C, h, w), and how it was mixed."""
        mixing, n, draw = self.config.mixing, len(batch.images), {"seed": self.config.seed, "epoch": epoch}
        same_step = mixing.uses_peaks and mixing.peaks_from == "same_step"
        if mixing.kind == "gradmix" and not same_step:
            if mixing.uses_peaks:
                known = first.geometry.to_view(self.peaks.lookup(batch.indices))
                centers = else_random(known, batch.indices, **draw)
            else:
                centers = random_places(batch.indices, mixing.num_patches, **draw)
            partner, gamma = partners(n, self.device), draw_gamma(mixing, batch.indices, step=step, **draw)
            views = self.render(batch, first, second, partner=partner, centers=centers, gamma=gamma)
            return views, Mixed(views[2 * n :], gamma, None, partner)
        views = self.render(batch, first, second)
        centers = None
        if same_step:
            centers = else_random(self.same_step_peaks(batch, views, epoch, step), batch.indices, **draw)
        mixed = mix(views[:n], batch.indices, centers, mixing, step=step, **draw)
        return torch.cat([views, mixed.views]), mixed

    def same_step_peaks(self, batch: Batch, views: Tensor, epoch: int, step: int) -> Tensor:
        """Peaks (N, P, 2) of the first of the views (2N, C, h, w) by an extra pass that changes neither gradients nor
        statistics."""
        mixing, encoder, n = self.config.mixing, self.engine.module, len(batch.images)
        seen, keys = self.method.split(views, n, epoch=epoch, step=step)
        with frozen_statistics(encoder):
            with self.autocast:
                encoded = encoder(seen, mixing.layers)
            losses = self.method.losses(encoded, keys, batch.labels, None, self.config.objective_at(epoch))
            maps = list(encoded.maps.values())
            gradients = torch.autograd.grad(losses.total, maps)
        found = [a.detach()[:n] for a in maps], [g[:n] for g in gradients]
        return places(*found, mixing, batch.indices, seed=self.config.seed, epoch=epoch)


def new_encoder(config: TrainConfig, build: Build) -> Encoder:
    """An untrained encoder with what the method needs on top."""
    manifest = build.manifest
    return Encoder(config.encoder, manifest.channels, config.objective.classifier, len(manifest.class_names))
