import SwiftUI

/// Images of a seed, and the self-test of this device, for any app: `SamplerView()`.
public struct SamplerView: View {
    @State private var seed = 7
    @State private var count = 4
    @State private var pictures: [CGImage] = []
    @State private var message = "loading"
    @State private var sampler: Sampler?

    public init() {}

    public var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            Stepper("Seed \(seed)", value: $seed, in: 0...Int(Int32.max))
            Stepper("Images \(count)", value: $count, in: 1...16)
            LazyVGrid(columns: [GridItem(.adaptive(minimum: 96))]) {
                ForEach(pictures.indices, id: \.self) { index in
                    Image(decorative: pictures[index], scale: 1).interpolation(.none).resizable().scaledToFit()
                }
            }
            HStack {
                Button("Draw", action: draw)
                Button("Self-test", action: test)
            }
            .disabled(sampler == nil)
            Text(message).font(.footnote)
        }
        .padding()
        .task { await load() }
    }

    private func load() async {
        do {
            sampler = try await Sampler(SamplerBundle.embedded())
            draw()
        } catch { message = "\(error)" }
    }

    private func draw() {
        guard let sampler else { return }
        do {
            let start = Date()
            let images = try sampler.sample(seed: UInt64(seed), count: count, classLabels: sampler.classZero(count))
            message = String(format: "%d images in %.0f ms", count, Date().timeIntervalSince(start) * 1e3)
            pictures = images.compactMap { Self.picture($0, sampler.imageShape) }
        } catch { message = "\(error)" }
    }

    private func test() {
        guard let sampler else { return }
        do { message = try sampler.selfTest().line } catch { message = "\(error)" }
    }

    /// round((x + 1) * 127.5) of (C, H, W) as a picture; 1 or 3 channels.
    static func picture(_ image: [Float], _ shape: [Int]) -> CGImage? {
        let (channels, height, width) = (shape[0], shape[1], shape[2])
        guard channels == 1 || channels == 3 else { return nil }
        var pixels = [UInt8](repeating: 0, count: image.count)
        for channel in 0..<channels {
            for pixel in 0..<height * width {
                let value = max(-1, min(1, image[channel * height * width + pixel]))
                pixels[pixel * channels + channel] = UInt8(((value + 1) * 127.5).rounded())
            }
        }
        guard let provider = CGDataProvider(data: Data(pixels) as CFData) else { return nil }
        return CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 8 * channels, bytesPerRow: width * channels,
            space: channels == 3 ? CGColorSpaceCreateDeviceRGB() : CGColorSpaceCreateDeviceGray(),
            bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.none.rawValue), provider: provider, decode: nil,
            shouldInterpolate: false, intent: .defaultIntent)
    }
}
