package edgewright.android

import android.content.Context
import android.content.res.AssetManager
import edgewright.Installer
import edgewright.LoadOptions
import edgewright.Model
import edgewright.Shipped
import java.io.File
import java.io.InputStream

/** The model in an app's assets. */
private class AssetFolder(private val assets: AssetManager, private val folder: String) : Shipped {
    override val names: Set<String> = assets.list(folder).orEmpty().toSet()

    override fun open(name: String): InputStream = assets.open("$folder/$name", AssetManager.ACCESS_STREAMING)
}

/** The model of an app: `prepare()` it once, collecting its progress, then `open` it off the main thread. */
class InstalledModel(private val context: Context, assets: String = "model") {
    private val installer = Installer(AssetFolder(context.assets, assets), File(context.filesDir, "edgewright"))

    val folder get() = installer.folder

    fun prepare() = installer.prepare()

    /** Throws EdgewrightException, also where the phone has too little memory. */
    fun open(threads: Int = fastCores(), checkHashes: Boolean = true): Model {
        prepareRuntime()
        return installer.open(LoadOptions(threads, checkHashes, availableMemory(context), SharedBuffers()))
    }
}
