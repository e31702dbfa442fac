"""DICOM series of a few small slices, written with pydicom."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation
from skimage.measure import find_contours

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


# ---- LIDC-IDRI: a series with the XML file of its readers

MARKS = ("subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation", "spiculation", "texture", "malignancy")


def trace(mask):
    "LIDC outlines (inclusion, points) of a 2D mask: the first pixels outside it, in order; holes become exclusions."
    padded, found = np.pad(mask, 1), []
    for line in find_contours(padded.astype(float), 0.5, fully_connected="low"):
        low, high = np.floor(line).astype(int), np.ceil(line).astype(int)  # between a pixel inside and one outside
        outside = np.where(padded[tuple(low.T)][:, None], high, low) - 1
        r, c = line.T
        found.append((bool(np.sum(r * np.roll(c, -1) - c * np.roll(r, -1)) < 0), outside[(outside != np.roll(outside, 1, axis=0)).any(1)]))
    return found


def roi(instance, z, points, inclusion=True):
    edges = "".join(f"<edgeMap>\n<xCoord>{x}</xCoord>\n<yCoord>{y}</yCoord>\n</edgeMap>\n" for y, x in points)
    return (f"<roi>\n<imageZposition>{z:.6f} </imageZposition>\n<imageSOP_UID>{instance}</imageSOP_UID>\n"
            f"<inclusion>{str(inclusion).upper()}</inclusion>\n{edges}</roi>\n")


def nodule_xml(rois, ratings=(5, 1, 6, 3, 4, 2, 2, 5, 4), name="Nodule 001"):
    marks = "".join(f"<{key}>{value}</{key}>\n" for key, value in zip(MARKS, ratings))
    return f"<unblindedReadNodule>\n<noduleID>{name}</noduleID>\n<characteristics>\n{marks}</characteristics>\n{''.join(rois)}</unblindedReadNodule>\n"


def readings_xml(series, sessions):
    "The XML file of a series; `sessions` holds the text within each readingSession."
    head = f"<ResponseHeader>\n<Version>1.8.1</Version>\n<SeriesInstanceUid>{series}</SeriesInstanceUid>\n</ResponseHeader>\n"
    body = "".join(f"<readingSession>\n<annotationVersion>3.12</annotationVersion>\n<servicingRadiologistID>anonymous</servicingRadiologistID>\n"
                   f"{session}</readingSession>\n" for session in sessions)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage uid="1.3" xmlns="http://www.nih.gov">\n{head}{body}</LidcReadMessage>\n'


class Archived:
    "A series in an archive: its folder, its slices and what its readers drew, to be spoilt by a test before it is written."

    def __init__(self, root, nodules, spacing=(2.0, 0.75), margin=10, patient="LIDC-IDRI-0001", seed=0):
        "`nodules`: one array (R, D, H, W) for each nodule, all of one shape; put into a CT with a margin of pixels and 5 slices."
        rng = np.random.default_rng(seed)
        masks = [np.pad(m, ((0, 0), (5, 5), (margin, margin), (margin, margin))) for m in nodules]
        self.masks, self.spacing = masks, (spacing[0], spacing[1], spacing[1])
        self.ct = rng.integers(-900, 100, masks[0].shape[1:])
        self.study, self.series = f"1.2.{rng.integers(10**9)}", f"1.2.{rng.integers(10**9)}"
        self.folder = root / patient / self.study / self.series
        self.datasets = []
        for k, plane in enumerate(self.ct):
            ds = dataset(plane + 1024, (-50, -60, -100 + k * spacing[0]), uid=self.series, number=k + 1, PatientID=patient, PatientName=patient)
            ds.PixelSpacing, ds.SliceThickness = [f"{v:.6f}" for v in self.spacing[1:]], f"{spacing[0]:.4f}"
            self.datasets.append(ds)
        sessions = max(len(m) for m in masks)
        self.rois = [[self.outlines(m[r]) for m in masks if r < len(m)] for r in range(sessions)]

    def outlines(self, mask):
        return [roi(self.datasets[k].SOPInstanceUID, self.z(k), points, inclusion)
                for k, plane in enumerate(mask) for inclusion, points in trace(plane)]

    def z(self, k):
        return float(self.datasets[k].ImagePositionPatient[2])

    def xml(self):
        return readings_xml(self.series, ["".join(nodule_xml(rois, name=f"Nodule {n}") for n, rois in enumerate(one)) for one in self.rois])

    def write(self, without=(), xml=True):
        for k, ds in enumerate(self.datasets):
            if k not in without:
                save(ds, self.folder / f"1-{k + 1:03d}.dcm")
        if xml:
            (self.folder / "069.xml").write_text(self.xml(), encoding="utf-8")
        return self
