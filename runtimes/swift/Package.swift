// swift-tools-version:5.7
import PackageDescription

let package = Package(
    name: "MMDBundle",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "MMDBundle", targets: ["MMDBundle"])],
    targets: [
        .target(name: "MMDBundle", resources: [.copy("bundle")]),
        .testTarget(name: "MMDBundleTests", dependencies: ["MMDBundle"]),
    ]
)
