import CryptoKit
import Foundation

/// What is wrong, where, both values and the next move, in one line.
public struct SamplerError: LocalizedError, CustomStringConvertible {
    public let description: String
    public var errorDescription: String? { description }
}

/// The fields of `manifest.json` that an app needs.
public struct Manifest: Decodable {
    public struct Spec: Decodable {
        public let name: String
        public let dtype: String
        public let shape: [Int]
        /// int64 values are 0 ... below - 1; nil where the manifest does not tell.
        public let below: Int?
    }
    public struct File: Decodable {
        public let path: String
        public let size: Int
        public let sha256: String
    }
    public struct Tolerance: Decodable { public let atol: Double }
    struct Plan: Decodable {
        struct Step: Decodable {}
        let steps: [Step]
    }

    public let name: String
    public let format: String
    public let artefact: String
    public let inputs: [Spec]
    public let outputs: [Spec]
    public let tolerance: Tolerance
    public let hardware: [String: String]?
    public let files: [File]
    let plan: Plan
    let manifest_sha256: String
}

/// An array of the golden file, integers as Int32, the only ones that Core ML takes.
public struct Golden {
    public let shape: [Int]
    public let floats: [Float]
    public let integers: [Int32]
}

/// A bundle whose every byte was checked: the rules of the page "A bundle, seen from an app" of mmd-export.
public struct SamplerBundle {
    public let folder: URL
    public let manifest: Manifest
    public let golden: [String: Golden]

    /// The bundle that lies in this package.
    public static func embedded() throws -> SamplerBundle {
        guard let folder = Bundle.module.url(forResource: "bundle", withExtension: nil) else {
            throw SamplerError(description: "there is no folder bundle in the package; copy one into Sources/MMDBundle")
        }
        return try SamplerBundle(folder: folder)
    }

    public init(folder: URL) throws {
        self.folder = folder
        let text = try Self.read(folder.appendingPathComponent("manifest.json"), as: "manifest.json")
        manifest = try Self.parse(text, bundle: folder.lastPathComponent)
        try Self.checkFiles(folder, manifest)
        let data = try Self.read(folder.appendingPathComponent("golden.safetensors"), as: "golden.safetensors")
        golden = try Self.parseGolden(data, manifest)
    }

    static func damaged(_ bundle: String, _ reason: String) -> SamplerError {
        SamplerError(description: "bundle \(bundle): \(reason); rebuild the bundle or copy it again")
    }

    static func read(_ url: URL, as name: String) throws -> Data {
        do { return try Data(contentsOf: url) } catch {
            throw damaged(url.deletingLastPathComponent().lastPathComponent, "'\(name)' is missing or cannot be read")
        }
    }

    static func hash(_ data: Data) -> String {
        SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
    }

    // MARK: the manifest

    static func parse(_ data: Data, bundle: String) throws -> Manifest {
        guard let text = String(data: data, encoding: .utf8), data.count <= 64 << 20,
            let root = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
        else { throw damaged(bundle, "manifest.json is not readable JSON") }
        try requireDistinctKeys(text, bundle)
        guard let version = root["schema_version"] as? Int, version == 1 else {
            let found = root["schema_version"].map { "\($0)" } ?? "none"
            throw damaged(bundle, "manifest.json has schema version \(found), this program reads 1")
        }
        try checkFields(root, bundle)
        let manifest: Manifest
        do { manifest = try JSONDecoder().decode(Manifest.self, from: data) } catch let DecodingError.keyNotFound(key, _) {
            throw damaged(bundle, "manifest.json is not valid: \(key.stringValue): it is missing")
        } catch { throw damaged(bundle, "manifest.json is not valid: \(error)") }
        try checkLists(manifest, bundle)
        // The seal: the hash of the text without its own line.
        var lines = text.components(separatedBy: "\n")
        lines.removeAll { $0.hasPrefix(" \"manifest_sha256\": ") }
        let found = hash(Data(lines.joined(separator: "\n").utf8))
        guard found == manifest.manifest_sha256 else {
            throw damaged(bundle, "manifest.json was changed: its hash is \(found), it says \(manifest.manifest_sha256)")
        }
        return manifest
    }

    /// JSONSerialization takes a key that stands twice. In the canonical form, a line a value, this is easily seen.
    static func requireDistinctKeys(_ text: String, _ bundle: String) throws {
        var seen: [Int: Set<String>] = [:]
        for line in text.split(separator: "\n") {
            let depth = line.prefix { $0 == " " }.count
            seen = seen.filter { $0.key <= depth }
            let rest = line.dropFirst(depth)
            guard rest.first == "\"", let end = rest.range(of: "\": ") else { continue }
            let key = String(rest[rest.index(after: rest.startIndex)..<end.lowerBound])
            if !seen[depth, default: []].insert(key).inserted {
                throw damaged(bundle, "manifest.json is not readable JSON (key '\(key)' stands twice)")
            }
        }
    }

    /// Numbers whose messages JSONDecoder would not give.
    static func checkFields(_ root: [String: Any], _ bundle: String) throws {
        let tolerance = root["tolerance"] as? [String: Any]
        if tolerance != nil {
            let atol = (tolerance?["atol"] as? NSNumber)?.doubleValue ?? -1
            guard atol >= 0, atol.isFinite else {
                throw damaged(bundle, "manifest.json is not valid: tolerance.atol: it is no number from 0 on")
            }
        }
        for (index, entry) in ((root["files"] as? [[String: Any]]) ?? []).enumerated() {
            guard let size = entry["size"] as? NSNumber, size.doubleValue >= 0 else {
                throw damaged(bundle, "manifest.json is not valid: files.\(index).size: it is no number from 0 on")
            }
            if size.doubleValue > 9e15 {
                let path = entry["path"] ?? ""
                throw damaged(bundle, "'\(path)' has fewer bytes, the manifest says \(size)")
            }
        }
    }

    static func checkLists(_ manifest: Manifest, _ bundle: String) throws {
        func invalid(_ reason: String) -> SamplerError { damaged(bundle, "manifest.json is not valid: \(reason)") }
        for path in manifest.files.map(\.path) + [manifest.artefact] {
            let parts = path.split(separator: "/", omittingEmptySubsequences: false)
            let odd = path.unicodeScalars.contains { $0 == "\\" || $0 == ":" || $0.value < 0x20 || $0.value == 0x7f }
            if odd || parts.contains("") || parts.contains(".") || parts.contains("..") || path == "manifest.json" {
                throw invalid("'\(path)' is not a plain relative path")
            }
        }
        let paths = manifest.files.map(\.path)
        for (before, after) in zip(paths, paths.dropFirst())
        where !before.utf8.lexicographicallyPrecedes(after.utf8) {
            throw invalid("files are not sorted and distinct")
        }
        let artefact = paths.contains { $0 == manifest.artefact || $0.hasPrefix(manifest.artefact + "/") }
        if !artefact { throw invalid("files do not list '\(manifest.artefact)'") }
        if !paths.contains("golden.safetensors") { throw invalid("files do not list 'golden.safetensors'") }
        // A noise of another shape is told by the golden file, which holds the shape that the graph has.
        guard manifest.inputs.contains(where: { $0.name == "noise" }), manifest.outputs.count == 1,
            manifest.outputs[0].name == "sample", manifest.outputs[0].shape.count == 4
        else { throw invalid("inputs and outputs have no 'noise' and 'sample' of 4 dimensions") }
        for spec in manifest.inputs + manifest.outputs
        where spec.shape.count <= (spec.name == "step_noise" ? 1 : 0) || !spec.shape.allSatisfy({ $0 >= 1 }) {
            throw invalid("the shape of '\(spec.name)' has a dimension below 1, or too few")
        }
    }

    // MARK: the files

    static func checkFiles(_ folder: URL, _ manifest: Manifest) throws {
        func wrong(_ path: String, _ reason: String) -> SamplerError { damaged(manifest.name, "'\(path)' \(reason)") }
        let listed = Set(manifest.files.map(\.path) + ["manifest.json"])
        for path in try FileManager.default.subpathsOfDirectory(atPath: folder.path) {
            let url = folder.appendingPathComponent(path)
            let type = try FileManager.default.attributesOfItem(atPath: url.path)[.type] as? FileAttributeType
            if type == .typeSymbolicLink { throw wrong(path, "is a symbolic link") }
            if type == .typeDirectory { continue }
            if !listed.contains(path) { throw wrong(path, "is not in its manifest") }
        }
        for file in manifest.files {
            let url = folder.appendingPathComponent(file.path)
            guard let attributes = try? FileManager.default.attributesOfItem(atPath: url.path),
                let size = attributes[.size] as? NSNumber
            else { throw wrong(file.path, "is missing") }
            guard size.intValue == file.size else {
                throw wrong(file.path, "has \(size) bytes, the manifest says \(file.size)")
            }
            let found = hash(try Data(contentsOf: url, options: .mappedIfSafe))
            guard found == file.sha256 else {
                throw wrong(file.path, "has SHA-256 \(found), the manifest says \(file.sha256)")
            }
        }
    }

    // MARK: golden tensors

    static func parseGolden(_ data: Data, _ manifest: Manifest) throws -> [String: Golden] {
        func unreadable(_ reason: String) -> SamplerError {
            damaged(manifest.name, "golden.safetensors cannot be read: \(reason)")
        }
        guard data.count >= 8 else { throw unreadable("it has \(data.count) bytes") }
        let length = data.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= UInt64(data.count - 8) else { throw unreadable("its header is longer than the file") }
        let start = 8 + Int(length)
        guard let header = try? JSONSerialization.jsonObject(with: data.subdata(in: 8..<start)) as? [String: Any]
        else { throw unreadable("its header is no JSON object") }
        var tensors: [String: Golden] = [:]
        var places: [(Int, Int)] = []
        for (name, value) in header where name != "__metadata__" {
            guard let entry = value as? [String: Any], let dtype = entry["dtype"] as? String,
                let width = ["F32": 4, "I64": 8, "U8": 1][dtype], let shape = entry["shape"] as? [Int],
                let place = entry["data_offsets"] as? [Int], place.count == 2,
                place[0] >= 0, place[0] <= place[1], place[1] <= data.count - start,
                shape.allSatisfy({ $0 >= 0 && $0 < 1 << 24 }),
                shape.reduce(Double(width), { $0 * Double($1) }) == Double(place[1] - place[0])
            else { throw unreadable("'\(name)' does not fit its bytes") }
            places.append((place[0], place[1]))
            let bytes = data.subdata(in: start + place[0]..<start + place[1])
            let floats = dtype == "F32" ? bytes.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) } : []
            let integers = dtype == "I64" ? bytes.withUnsafeBytes { $0.bindMemory(to: Int64.self).map { Int32(clamping: $0) } } : []
            tensors[name] = Golden(shape: shape, floats: floats, integers: integers)
        }
        var at = 0
        for (first, end) in places.sorted(by: <) {
            if first != at { throw unreadable("its data has a hole or an overlap at \(at)") }
            at = end
        }
        if at != data.count - start { throw unreadable("its tensors have \(at) bytes, its data \(data.count - start)") }
        try checkGolden(tensors, manifest)
        return tensors
    }

    static func checkGolden(_ tensors: [String: Golden], _ manifest: Manifest) throws {
        let noise = manifest.inputs.first { $0.name == "noise" }!  // checkLists requires it
        var says = Dictionary((manifest.inputs + manifest.outputs).map { ($0.name, $0.shape) }) { first, _ in first }
        for k in 0..<manifest.plan.steps.count { says["state.\(k + 1)"] = noise.shape }
        guard Set(says.keys) == Set(tensors.keys) else {
            throw damaged(
                manifest.name,
                "golden.safetensors holds \(tensors.keys.sorted()), the manifest says \(says.keys.sorted())")
        }
        let count = tensors["noise"]?.shape.first ?? 0
        for (name, expected) in says {
            var shape = expected
            let axis = name == "step_noise" ? 1 : 0
            if axis < shape.count { shape[axis] = count }
            guard let tensor = tensors[name], tensor.shape == shape, count >= 1, count % noise.shape[0] == 0 else {
                throw damaged(
                    manifest.name,
                    "golden.safetensors: '\(name)' is \(tensors[name]?.shape ?? []), the manifest says \(shape)")
            }
            if !tensor.floats.allSatisfy(\.isFinite) {
                throw damaged(manifest.name, "golden.safetensors: '\(name)' holds NaN or infinite values")
            }
        }
    }
}
