"""Installation: everything is read from settings.ini, the one home of name, version and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
config = settings["DEFAULT"]
extras = {name: config[f"{name}_requirements"].split() for name in ("paper", "view", "dev")}

setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=config["author"],
    author_email=config["author_email"],
    keywords=config["keywords"].split(),
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3"],
    url=config["git_url"],
    python_requires=f">={config['min_python']}",
    packages=find_packages(include=["medmatting", "medmatting.*"]),
    package_data={"medmatting": ["data/**/*"]},
    install_requires=config["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": config["console_scripts"].split()},
    zip_safe=False,
)
