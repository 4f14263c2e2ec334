"""Pipelines of every kind, small enough for a test: made from configurations, read from folders."""

from pathlib import Path

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_stable_diffusion import MAX_TOKENS, build_pipeline, build_tokenizer, byte_letters
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLASSES = 3
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_vae(channels=4, halvings=1, **options) -> AutoencoderKL:
    """Of pictures twice as large as its latents, or four times, …"""
    return AutoencoderKL(
        **{
            "latent_channels": channels,
            "block_out_channels": (8,) * (halvings + 1),
            "down_block_types": ("DownEncoderBlock2D",) * (halvings + 1),
            "up_block_types": ("UpDecoderBlock2D",) * (halvings + 1),
            "norm_num_groups": 4,
            "sample_size": 16,
            **options,
        }
    )


def build_clip(width=8, projection=8, kind=CLIPTextModelWithProjection):
    return kind(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=projection,
            bos_token_id=512,
            eos_token_id=513,
        )
    )


def build_t5(width=24) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def build_t5_tokenizer() -> T5TokenizerFast:
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters]
    return T5TokenizerFast(vocab=words, extra_ids=0)


def sdxl(vocabulary: Path):
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            attention_head_dim=2,
            cross_attention_dim=16,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            # six sizes, and the second encoder's projection
            projection_class_embeddings_input_dim=6 * 4 + 8,
        ),
        vae=build_vae(),
        text_encoder=build_clip(kind=CLIPTextModel),
        tokenizer=build_tokenizer(vocabulary),
        text_encoder_2=build_clip(),
        tokenizer_2=build_tokenizer(vocabulary),
        scheduler=DDIMScheduler(**SCHEDULE),
        add_watermarker=False,
    )


def dit(vocabulary: Path, learned=True):
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8 if learned else 4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
            norm_elementwise_affine=False,
        ),
        vae=build_vae(),
        scheduler=DDIMScheduler(),
    )


def sd3(vocabulary: Path, t5=True, qk_norm="rms_norm"):
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_projection_dim=8,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            qk_norm=qk_norm,
        ),
        vae=build_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=build_clip(),
        tokenizer=build_tokenizer(vocabulary),
        text_encoder_2=build_clip(),
        tokenizer_2=build_tokenizer(vocabulary),
        text_encoder_3=build_t5() if t5 else None,
        tokenizer_3=build_t5_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(vocabulary: Path, guidance=True):
    shifting = {"use_dynamic_shifting": True, "shift": 3.0} if guidance else {"shift": 1.0}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance,
        ),
        vae=build_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=build_clip(kind=CLIPTextModel),
        tokenizer=build_tokenizer(vocabulary),
        text_encoder_2=build_t5(),
        tokenizer_2=build_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
    )


def schnell(vocabulary: Path):
    return flux(vocabulary, guidance=False)


BUILDERS = {"sdxl": sdxl, "dit": dit, "sd3": sd3, "flux": flux, "schnell": schnell}
# what a LoRA is put into where a test says nothing else
KINDS = ("sd", *BUILDERS)


def build(kind: str, folder: Path, seed: int = 0, **options) -> Path:
    """Save a pipeline of a kind, of random weights that matter, in ``folder``."""
    if kind == "sd":
        return build_pipeline(folder, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pipeline = (BUILDERS | OTHERS)[kind](folder.parent / "vocabulary", **options)
        network = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
        # layers that begin at zero would hide those before them
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    # FLUX says its size nowhere
    pipeline.save_pretrained(folder)
    return folder


def pixart(vocabulary: Path):
    return PixArtAlphaPipeline(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=8,
            sample_size=8,
            caption_channels=24,
            # as of the model of 1,024 pixels, which is told the size
            use_additional_conditions=False,
        ),
        vae=build_vae(),
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
    )


def sana(vocabulary: Path):
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=24,
            sample_size=8,
            timestep_scale=0.001,
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            # its pipeline takes multiples of 32 pixels
            encoder_block_types=("ResBlock",) * 6,
            decoder_block_types=("ResBlock",) * 6,
            encoder_block_out_channels=(4,) * 6,
            decoder_block_out_channels=(4,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    )


def lumina(vocabulary: Path):
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=3,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 16, 16),
            cap_feat_dim=24,
        ),
        # its pipeline is made for this one
        vae=build_vae(halvings=3, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def auraflow(vocabulary: Path):
    return AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        vae=build_vae(),
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def chroma(vocabulary: Path):
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=8,
            approximator_layers=1,
        ),
        vae=build_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    """Of bytes, with the words of a chat."""
    words = [*byte_letters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    return tokenizer


TINY_QWEN = {
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}


def qwen(vocabulary: Path):
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(2, 2, 4),
        ),
        # of videos, with one frame
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[-0.7, 0.1, 0.4, -1.2],
            latents_std=[2.8, 1.4, 0.6, 1.1],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    **TINY_QWEN,
                    "num_hidden_layers": 1,
                    "rope_scaling": {"type": "default", "mrope_section": [1, 1, 0]},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_heads": 2,
                    "out_hidden_size": 8,
                },
            )
        ),
        tokenizer=build_qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )


def klein(vocabulary: Path):
    vae = AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    # it scales every number of a token by itself
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.2, 4)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        vae=vae,
        # of which three layers are read
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**TINY_QWEN, head_dim=4, num_hidden_layers=27)),
        tokenizer=build_qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        is_distilled=True,
    )


def z_image() -> ZImagePipeline:
    """Whose network takes lists, which is refused."""
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 2, 2],
        ),
        vae=build_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**TINY_QWEN, head_dim=4, num_hidden_layers=2)),
        tokenizer=build_qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


# of no file in dtrak/models: recorded
OTHERS = {
    "pixart": pixart,
    "sana": sana,
    "lumina": lumina,
    "auraflow": auraflow,
    "chroma": chroma,
    "qwen": qwen,
    "klein": klein,
}
