"""DICOM series of a few small slices, written with pydicom."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

TURN = Rotation.from_euler("xyz", [10, -25, 40], degrees=True).as_matrix()


def dataset(stored, position, axes=np.eye(3), uid="1.2.3", number=1, slope=1, intercept=-1024, signed=True, bits=16, **extra):
    "One slice; `axes` columns: along a row, along a column, normal."
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
    ds.PatientName, ds.PatientID = "Secret^Name", "secret-id"
    ds.StudyInstanceUID, ds.Modality, ds.InstanceNumber, ds.SliceThickness = "1.2", "CT", number, 2.5
    ds.ConvolutionKernel, ds.FrameOfReferenceUID = "STANDARD", "1.2.1"
    ds.ImagePositionPatient = [f"{v:.6f}" for v in position]
    ds.ImageOrientationPatient = [f"{v:.9f}" for v in axes[:, :2].T.ravel()]
    ds.PixelSpacing, (ds.Rows, ds.Columns) = [0.7, 0.8], stored.shape
    ds.RescaleSlope, ds.RescaleIntercept, ds.SamplesPerPixel = slope, intercept, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelData = stored.astype(np.int16 if signed else np.uint16).tobytes()
    for name, value in extra.items():
        setattr(ds, name, value)
    return ds


def save(ds, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def series(folder, n=6, axes=np.eye(3), origin=(-20, -30, 7), gap=2.5, skip=(), seed=0, prefix="", **options):
    "Write a series under shuffled names; returns the stored numbers (n, 5, 6) in order along the normal."
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 2000, (n, 5, 6))
    for name, k in enumerate(rng.permutation(n)):
        if k not in skip:
            ds = dataset(stored[k], np.array(origin) + k * gap * axes[:, 2], axes, number=n - k, **options)
            save(ds, folder / f"{prefix}{name:03d}.dcm")
    return stored


def enhanced(path):
    "An enhanced multi-frame CT with frames out of order; returns the stored numbers in order along z."
    stored = np.random.default_rng(0).integers(0, 2000, (4, 5, 6))
    order = [2, 0, 3, 1]
    ds = dataset(stored[0], (0, 0, 0), SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=4,
                 PixelData=stored[order].astype(np.int16).tobytes())
    shared, measures, plane, values = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, 2.5
    plane.ImageOrientationPatient = ds.ImageOrientationPatient
    values.RescaleSlope, values.RescaleIntercept = 1, -1024
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [values]
    ds.SharedFunctionalGroupsSequence, frames = [shared], []
    for k in order:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [-20, -30, 2.5 * k]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
                 "SliceThickness"):
        delattr(ds, name)
    save(ds, path)
    return stored
