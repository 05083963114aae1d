"""Kit ``swift``: a Swift package that runs the package of Core ML, with a view for SwiftUI and its tests."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="swift",
    summary="a Swift package, by default for iOS 17 and macOS 14 on; not compiled yet: no Swift compiler was at hand",
    formats=("mlpackage",),
    libraries=(Library("Core ML, CryptoKit and SwiftUI", "Apple's own", "the system"),),
    run=("swift build", "swift test"),
    bundle_at="Sources/MMDBundle/bundle",
)
