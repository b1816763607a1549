// A STUB of Apple's CoreML module: the declarations that the adapter uses, to check its types where there is no Core ML. Nothing runs.
import Foundation

public enum MLComputeUnits: Int, Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }
public enum MLMultiArrayDataType: Int, Sendable { case double = 65600, float32 = 65568, float16 = 65552, int32 = 131104 }

public final class MLModelConfiguration {
  public var computeUnits: MLComputeUnits = .all
  public var functionName: String?
  public init() {}
}

public final class MLMultiArray {
  public let shape: [NSNumber]
  public let dataType: MLMultiArrayDataType
  public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws { fatalError("a stub") }
  public var strides: [NSNumber] { fatalError("a stub") }
  public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R { fatalError("a stub") }
  public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
    fatalError("a stub")
  }
}

public final class MLFeatureValue { public var multiArrayValue: MLMultiArray? { fatalError("a stub") } }
public protocol MLFeatureProvider { func featureValue(for featureName: String) -> MLFeatureValue? }
public final class MLDictionaryFeatureProvider: MLFeatureProvider {
  public init(dictionary: [String: Any]) throws { fatalError("a stub") }
  public func featureValue(for featureName: String) -> MLFeatureValue? { fatalError("a stub") }
}

public final class MLMultiArrayConstraint {
  public var shape: [NSNumber] { fatalError("a stub") }
  public var dataType: MLMultiArrayDataType { fatalError("a stub") }
}
public final class MLFeatureDescription {
  public var multiArrayConstraint: MLMultiArrayConstraint? { fatalError("a stub") }
}
public final class MLModelDescription {
  public var inputDescriptionsByName: [String: MLFeatureDescription] { fatalError("a stub") }
}
public final class MLState {}

public final class MLModel {
  public init(contentsOf url: URL, configuration: MLModelConfiguration) throws { fatalError("a stub") }
  public class func compileModel(at url: URL) throws -> URL { fatalError("a stub") }
  public var modelDescription: MLModelDescription { fatalError("a stub") }
  public func makeState() -> MLState { fatalError("a stub") }
  public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider { fatalError("a stub") }
  public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
    fatalError("a stub")
  }
}
