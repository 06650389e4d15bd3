"""Installs the packages of this project. The versions it is tested with stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="gradmix-osr",
    version="0.1.0",
    description="Distributed training of open set recognition with GradMix",
    python_requires=">=3.11",
    packages=find_packages(include=["data_pipeline*", "trainer*", "tuning*", "cluster*"]),
    package_data={
        "data_pipeline": ["*.json"],
        "trainer.evaluation": ["*.jinja"],
        "trainer.reproduce": ["*.json"],
        "tuning": ["*.yaml"],
    },
    install_requires=[
        "torch",
        "torchvision",  # data sets and residual blocks
        "triton; platform_system == 'Linux'",  # fused kernels on CUDA
        "deepspeed",  # the training engine and the multi-node launcher
        "ninja",  # DeepSpeed builds its operators with it
        "ffcv",  # the data format; compiles against OpenCV and libturbojpeg
        # The dashboard of "default" is how Tune frees the resources of trials that are stopped early.
        "ray[tune,default]",
        "optuna",  # the searcher behind Tune, importance and plots
        "matplotlib",  # plots
        "pyyaml",  # the search space
        "mlflow",  # runs and the model registry
        "numpy",
        "pandas",  # the answer of a served model
        "scikit-learn",  # the bundled digits, nearest neighbours
        "scipy",  # bootstrap, two-sample tests, image filters
        "opencv-python",  # corruptions
        "scikit-dimension",  # intrinsic dimension
        "pytorch-ood",  # out-of-distribution detectors
        "adversarial-robustness-toolbox",  # attacks
        "jinja2",  # HTML reports and explanations
        "pyarrow",  # Parquet data sets
        "pillow",  # image decoding
        "safetensors",  # weights without pickle
        "tyro",  # typed command lines over dataclasses
        "rich",  # progress bars and tables
        "psutil",  # free memory
    ],
    extras_require={
        "server": ["mlflow[auth]", "psycopg[binary]"],  # cluster/mlflow
        "export": ["onnx", "onnxscript", "onnxruntime"],  # trainer.export
        "page": ["nicegui"],  # trainer.page
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "jsonschema",  # Ray's cluster files
            "kubernetes-validate",
            "playwright",  # the page in a real browser
            "gradmix-osr[server,export,page]",
        ],
    },
)
